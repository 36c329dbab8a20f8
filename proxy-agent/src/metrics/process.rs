//! What every exporter says of its process (Prometheus' client guidelines, "standard and runtime collectors").

use std::{fs, io};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// The process, as the kernel sees it now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Process {
    cpu_seconds: f64,
    open_fds: u64,
    max_fds: u64,
    virtual_bytes: u64,
    resident_bytes: u64,
    /// Since 1970.
    start_seconds: f64,
}

impl Process {
    /// Reads it.
    ///
    /// # Errors
    /// /proc is not to be read.
    pub fn read() -> io::Result<Self> {
        let number = |name| Ok::<_, io::Error>(sysconf(name)?.unwrap_or(0).cast_unsigned());
        let (ticks, page) = (number(SysconfVar::CLK_TCK)?, number(SysconfVar::PAGE_SIZE)?);
        let stat = fs::read_to_string("/proc/self/stat")?;
        // Behind the name, which may hold anything.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let fields: Vec<u64> = fields
            .split(' ')
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        // Numbers of proc_pid_stat(5), which begin with the process id and the name.
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        let in_seconds = |count: u64| count as f64 / ticks.max(1) as f64;
        let boot = fs::read_to_string("/proc/stat")?;
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime "));
        let boot: f64 = boot.and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0);
        Ok(Self {
            cpu_seconds: in_seconds(field(14) + field(15)),
            open_fds: fs::read_dir("/proc/self/fd")?.count() as u64,
            max_fds: getrlimit(Resource::RLIMIT_NOFILE)?.0,
            virtual_bytes: field(23),
            resident_bytes: field(24) * page,
            start_seconds: boot + in_seconds(field(22)),
        })
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let Self {
            cpu_seconds,
            open_fds,
            max_fds,
            virtual_bytes,
            resident_bytes,
            start_seconds,
        } = *self;
        let registry = registry.sub_registry_with_prefix("process");
        registry.register(
            "cpu_seconds",
            "Total user and system CPU time spent in seconds",
            ConstCounter::new(cpu_seconds),
        );
        let gauges = [
            (
                "open_fds",
                "Number of open file descriptors",
                open_fds as f64,
            ),
            (
                "max_fds",
                "Maximum number of open file descriptors",
                max_fds as f64,
            ),
            (
                "virtual_memory_bytes",
                "Virtual memory size in bytes",
                virtual_bytes as f64,
            ),
            (
                "resident_memory_bytes",
                "Resident memory size in bytes",
                resident_bytes as f64,
            ),
            (
                "start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                start_seconds,
            ),
        ];
        for (name, help, value) in gauges {
            registry.register(name, help, ConstGauge::new(value));
        }
    }
}
