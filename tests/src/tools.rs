//! Programs that an agent finds before those of the machine.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::{Agent, agent::agent_binary};

/// A folder of scripts.
#[derive(Debug)]
pub struct Tools(PathBuf);

impl Tools {
    /// Makes the folder, which an agent prefers from its next start on.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(folder: PathBuf, agent: &mut Agent) -> anyhow::Result<Self> {
        fs::create_dir(&folder)?;
        agent.prefer(&folder)?;
        Ok(Self(folder))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Has the agent, and the tools that it starts, see `file` where the machine has `place`, from its next start on.
    ///
    /// # Errors
    /// There is no agent.
    pub fn show(&self, file: &Path, place: &str, agent: &mut Agent) -> anyhow::Result<()> {
        let mount = format!("mount --bind {} {place}", file.display());
        let run = format!("exec {} \"$@\"", agent_binary()?.display());
        self.put(
            "agent",
            &format!("exec unshare --mount sh -c '{mount} && {run}' sh \"$@\""),
        )?;
        agent.use_binary(&self.0.join("agent"));
        Ok(())
    }

    /// Makes a program of a shell's script.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&self, name: &str, script: &str) -> anyhow::Result<()> {
        let draft = self.0.join("draft");
        fs::write(&draft, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&draft, Permissions::from_mode(0o755))?;
        // At once: a program that is being written cannot be run.
        fs::rename(&draft, self.0.join(name))?;
        Ok(())
    }
}
