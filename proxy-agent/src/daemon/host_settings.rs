//! Settings of the host that kube-proxy makes: limits and timeouts of connection tracking, and how soon the kernel ends this
//! process when memory runs out.
//!
//! Numbers are only ever raised: a smaller one than an administrator chose would be a surprise (cmd/kube-proxy/app/conntrack.go
//! does the same). What cannot be written is told once, and the node is served all the same.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{cli::HostSettings, metrics::Metrics};

const NETFILTER: &str = "proc/sys/net/netfilter";
const HASH_SIZE: &str = "sys/module/nf_conntrack/parameters/hashsize";
const CPUS: &str = "sys/devices/system/cpu/online";
const OOM_SCORE: &str = "proc/self/oom_score_adj";
/// What kubelet gives pods of the priority system-node-critical (pkg/kubelet/qos/policy.go, v1.36).
const OF_CRITICAL_PODS: i16 = -997;
/// Entries of connection tracking for each bucket of its hash table.
const ENTRIES_PER_BUCKET: u64 = 4;

/// Makes them below `root`, which is `/` but in tests, and those of this process.
pub fn apply(settings: &HostSettings, root: &Path, metrics: &Metrics) {
    let mut own = HostFiles { root, failed: 0 };
    own.oom_score(settings.oom_score_adj);
    let failed = own.failed + make(settings, root);
    metrics.host_settings_failed.set(failed);
}

/// Makes those that outlive this process; says how many could not be made.
pub fn make(settings: &HostSettings, root: &Path) -> i64 {
    let mut host = HostFiles { root, failed: 0 };
    match host.exists(&sysctl("nf_conntrack_max")) {
        true => host.conntrack(settings),
        false => {
            tracing::info!("connection tracking is not loaded: its limits and timeouts stay");
        }
    }
    host.failed
}

fn sysctl(name: &str) -> String {
    format!("{NETFILTER}/{name}")
}

/// What became of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Raised {
    Already,
    Now,
    Failed,
}

struct HostFiles<'a> {
    root: &'a Path,
    /// Settings that could not be made.
    failed: i64,
}

impl HostFiles<'_> {
    fn conntrack(&mut self, settings: &HostSettings) {
        let HostSettings {
            conntrack_max_per_core,
            conntrack_min,
            conntrack_tcp_timeout_established,
            conntrack_tcp_timeout_close_wait,
            conntrack_tcp_be_liberal,
            conntrack_udp_timeout,
            conntrack_udp_timeout_stream,
            oom_score_adj: _,
        } = *settings;
        if conntrack_max_per_core > 0 {
            let scaled = u64::from(conntrack_max_per_core) * self.cpus();
            self.limit(scaled.max(conntrack_min.into()));
        }
        for (name, timeout) in [
            (
                "nf_conntrack_tcp_timeout_established",
                conntrack_tcp_timeout_established,
            ),
            (
                "nf_conntrack_tcp_timeout_close_wait",
                conntrack_tcp_timeout_close_wait,
            ),
            ("nf_conntrack_udp_timeout", conntrack_udp_timeout),
            (
                "nf_conntrack_udp_timeout_stream",
                conntrack_udp_timeout_stream,
            ),
        ] {
            if timeout > Duration::ZERO {
                self.raise(&sysctl(name), timeout.as_secs());
            }
        }
        if conntrack_tcp_be_liberal {
            self.raise(&sysctl("nf_conntrack_tcp_be_liberal"), 1);
        }
    }

    /// 0 is no limit. The hash table is the whole machine's, so only who may set the limit, which is too, makes it larger.
    fn limit(&mut self, entries: u64) {
        let file = sysctl("nf_conntrack_max");
        let is_limited = read_number(&self.root.join(&file)).ok() != Some(0);
        if is_limited && self.raise(&file, entries) == Raised::Now {
            self.raise(HASH_SIZE, entries / ENTRIES_PER_BUCKET);
        }
    }

    fn raise(&mut self, file: &str, value: u64) -> Raised {
        let path = self.root.join(file);
        let result = read_number(&path).and_then(|before| {
            if before >= value {
                return Ok(Raised::Already);
            }
            fs::write(&path, value.to_string())?;
            tracing::info!(setting = %path.display(), before, value, "raised");
            Ok(Raised::Now)
        });
        result.unwrap_or_else(|error| {
            self.tell(&path, &value.to_string(), &error);
            Raised::Failed
        })
    }

    /// kube-proxy writes it whatever it was. Lowering it takes CAP_SYS_RESOURCE, which a pod need not have for this: kubelet
    /// protects a critical one nearly as well.
    fn oom_score(&mut self, score: i16) {
        let path = self.root.join(OOM_SCORE);
        let before = fs::read_to_string(&path).unwrap_or_default();
        match fs::write(&path, score.to_string()) {
            Ok(()) => {}
            Err(_) if is_protected_by_kubelet(&before) => tracing::info!(
                oom_score_adj = before.trim(),
                wanted = score,
                "kubelet protects this process from the want of memory"
            ),
            Err(error) => self.tell(&path, &score.to_string(), &error),
        }
    }

    fn tell(&mut self, path: &Path, value: &str, error: &io::Error) {
        self.failed += 1;
        let why = match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => "mounted read-only",
            io::ErrorKind::PermissionDenied => {
                "not ours to change: a missing capability, or another network namespace than the machine's first"
            }
            _ => "not written",
        };
        tracing::warn!(setting = %path.display(), value, %error, why, "a setting of the host stays as it is; set it by other means, or turn it off with its flag");
    }

    fn exists(&self, file: &str) -> bool {
        self.root.join(file).exists()
    }

    /// Those of the machine, not of this process's quota. One where that cannot be told.
    fn cpus(&self) -> u64 {
        let online = fs::read_to_string(self.root.join(CPUS)).unwrap_or_default();
        count(online.trim()).max(1)
    }
}

fn is_protected_by_kubelet(oom_score_adj: &str) -> bool {
    let score = oom_score_adj.trim().parse();
    score.is_ok_and(|score: i16| score <= OF_CRITICAL_PODS)
}

fn read_number(path: &PathBuf) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let number = text.trim().parse();
    number.map_err(|error| io::Error::other(format!("{:?}: {error}", text.trim())))
}

/// How many numbers there are in "0-3,5".
fn count(list: &str) -> u64 {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some((last + 1).saturating_sub(first))
    });
    ranges.sum()
}

#[cfg(test)]
mod tests;
