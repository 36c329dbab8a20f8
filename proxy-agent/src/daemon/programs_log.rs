//! `--log-programs`: lines that the programs write through aya-log become lines of the agent's own log.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::backends::ebpf::{links::Hook, sys};

/// How often to look whether the programs are attached.
const LOOK: Duration = Duration::from_millis(200);

/// Starts the thread that reads them; it ends with the process.
///
/// # Errors
/// There is no thread to be had.
pub fn start(links: PathBuf) -> io::Result<()> {
    let run = move || {
        if let Err(error) = follow(&links.join(Hook::Connect4.name())) {
            tracing::warn!(%error, "cannot read what the programs log: it takes CAP_SYS_ADMIN");
        }
    };
    thread::Builder::new()
        .name("programs-log".to_owned())
        .spawn(run)
        .map(drop)
}

/// All programs write to one ring buffer, which outlives them: it is found through the first.
fn follow(link: &Path) -> io::Result<()> {
    let program = loop {
        match sys::obj_get(link).and_then(sys::link_info) {
            Ok(info) => break info.prog_id,
            Err(error) if error.kind() == io::ErrorKind::NotFound => thread::sleep(LOOK),
            Err(error) => return Err(error),
        }
    };
    let mut logger =
        EbpfLogger::init_from_id_with_logger(program, Bridge).map_err(io::Error::other)?;
    loop {
        let mut waiting = [PollFd::new(logger.as_fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::NONE)?;
        logger.flush();
    }
}

/// From the `log` crate, which aya-log speaks, to ours.
struct Bridge;

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        // Asked for by a flag of their own: their level says nothing more.
        tracing::info!(target: "proxy_ebpf", "{}", record.args());
    }

    fn flush(&self) {}
}
