//! The configuration file: a change of it ends the process, as it ends kube-proxy's, and a new one reads it.
//!
//! Only what is written into the file itself, or renames it, counts (cmd/kube-proxy/app/options.go, `eventHandler`): kubelet
//! brings a changed ConfigMap in a new folder and deletes the old one, which has no effect before the next start.

use std::{
    io,
    path::{Path, PathBuf},
    thread,
};

use inotify::{EventMask, Inotify, WatchMask};
use tokio::sync::oneshot;

/// Returns the file when it was changed; never without one.
pub async fn changed(file: Option<&Path>) -> PathBuf {
    let Some(file) = file else {
        return std::future::pending().await;
    };
    let error = match watch(file) {
        Ok(change) => match change.await {
            Ok(Ok(())) => return file.to_owned(),
            Ok(Err(error)) => error,
            Err(_) => io::Error::other("its thread ended early: this is a bug"),
        },
        Err(error) => error,
    };
    tracing::warn!(file = %file.display(), %error, "cannot follow the configuration: a change has no effect before the next start");
    std::future::pending().await
}

/// Waits on a thread of its own.
fn watch(file: &Path) -> io::Result<oneshot::Receiver<io::Result<()>>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::MODIFY | WatchMask::MOVE_SELF;
    inotify.watches().add(file, mask)?;
    let (report, change) = oneshot::channel();
    let thread = thread::Builder::new().name("configuration".to_owned());
    // Nobody listens any more: nothing to tell.
    thread.spawn(move || drop(report.send(wait(inotify))))?;
    Ok(change)
}

fn wait(mut inotify: Inotify) -> io::Result<()> {
    let mut buffer = [0; 1024];
    loop {
        for event in inotify.read_events_blocking(&mut buffer)? {
            if event
                .mask
                .intersects(EventMask::MODIFY | EventMask::MOVE_SELF)
            {
                return Ok(());
            }
            // The file was deleted, and the watch with it: nothing will come any more.
            if event.mask.contains(EventMask::IGNORED) {
                return Err(io::Error::other("the file was deleted"));
            }
        }
    }
}
