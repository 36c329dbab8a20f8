//! The tables of the calling thread's network namespace, through the host's own tools.
//!
//! `iptables` comes in two variants with tables of their own, both of which the kernel walks. Rules go where the host's
//! other rules are, never into both; see [`variant`].

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    rules::Features,
    tables::{AddressSet, RestoreError, Table, Tables, whole},
};
use crate::{backends::Error, state::Family};

pub mod accounts;
pub mod affinity;
mod follow;
mod lock;
mod owner;
mod probe;
mod refusal;
mod run;
mod sets;
pub mod variant;

pub use owner::Owner;
pub use probe::is_in_kernel;
use run::{Output, run};
pub use variant::{Choice, Stale, Variant};

/// Chains of a transaction of the nft variant; see [`Tables::piece`]. Measured with 10,000 chains of ten rules and 1.8.9: 7.1 s
/// in one, 1.5 s in 10 or 20, 1.7 s in 50.
const PIECE: usize = 500;

/// How long a tool waits for the lock that all of them share, seconds.
const LOCK_WAIT_SECONDS: u32 = 5;

/// The tools of one variant, and `ipset` where there is one. With an owner, no other agent has them in this network
/// namespace; without, nothing may be changed that an agent writes.
#[derive(Clone, Debug)]
pub struct Host {
    choice: Choice,
    ipset: Option<PathBuf>,
    features: Features,
    /// Families that the tools or the kernel have no tables for, and what they say.
    lacks: BTreeMap<Family, String>,
    owner: Option<Arc<Owner>>,
}

impl Host {
    /// Finds the tools, and which variant this host uses; tries out what they and the kernel can do.
    ///
    /// # Errors
    /// There are none, or they work here in neither family: the text says which package brings them.
    pub fn open(owner: Arc<Owner>) -> Result<Self, Error> {
        let mut host = Self::untried(Some(owner))?;
        host.lacks = probe::lacks(|family| probe::serves(&host, family))?;
        host.features = probe::features(&mut host);
        Ok(host)
    }

    /// Whether the tools are installed.
    ///
    /// # Errors
    /// They are not: the text says which package brings them.
    pub fn installed() -> Result<(), Error> {
        variant::default_tool().map(drop)
    }

    /// Finds the tools, and tries no rule: enough for reading and removing rules.
    ///
    /// # Errors
    /// As for [`Host::open`].
    pub fn find(owner: Option<Arc<Owner>>) -> Result<Self, Error> {
        let mut host = Self::untried(owner)?;
        host.lacks = probe::lacks(|family| probe::reads(&host, family))?;
        Ok(host)
    }

    fn untried(owner: Option<Arc<Owner>>) -> Result<Self, Error> {
        Ok(Self {
            choice: variant::choose()?,
            ipset: run::find("ipset"),
            features: Features::default(),
            lacks: BTreeMap::new(),
            owner,
        })
    }

    /// For reading only, with what the tools and the kernel can do: tried in a network namespace that is thrown away.
    ///
    /// # Errors
    /// As for [`Host::open`]; there is no such namespace to be had.
    pub fn for_planning() -> Result<Self, Error> {
        probe::elsewhere(&Self::untried(None)?)
    }

    /// What was found, and why.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The variant in use.
    pub fn variant(&self) -> Variant {
        self.choice.variant
    }

    /// Why this one: for `check` and the log.
    pub fn why(&self) -> &str {
        &self.choice.why
    }

    /// Version of the tools: "1.8.9".
    pub fn version(&self) -> &str {
        &self.choice.version
    }

    /// What they and the kernel can do.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The families that cannot be served, and what the tools say.
    pub fn lacks(&self) -> &BTreeMap<Family, String> {
        &self.lacks
    }

    /// Tries the families that could not be served; says whether one can be now.
    pub fn try_again(&mut self) -> bool {
        let before = std::mem::take(&mut self.lacks);
        let tried = before.len();
        self.lacks = probe::failing(before.into_keys(), |family| probe::serves(self, family));
        self.lacks.len() < tried
    }

    fn tool(&self, family: Family, verb: &str) -> Result<PathBuf, Error> {
        self.choice.variant.tool(family, verb)
    }

    fn may_write(&self) -> Result<(), Error> {
        let reading =
            || Error::Unusable("the tables were opened without becoming their owner".to_owned());
        self.owner.as_ref().map(|_| ()).ok_or_else(reading)
    }

    fn ipset(&self) -> Result<&PathBuf, Error> {
        let missing = || Error::Unusable("ipset is not in PATH: install the package ipset".into());
        self.ipset.as_ref().ok_or_else(missing)
    }
}

fn restore_with(tool: &Path, table: &str, text: &str) -> Result<Output, Error> {
    let wait = LOCK_WAIT_SECONDS.to_string();
    run(tool, &["--noflush", "-w", &wait, "-T", table], text)
}

impl Tables for Host {
    fn families(&self) -> BTreeSet<Family> {
        let families = [Family::V4, Family::V6].into_iter();
        let served = families.filter(|family| !self.lacks.contains_key(family));
        served.collect()
    }

    fn read(
        &mut self,
        family: Family,
        table: Table,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        self.read_of(family, table.name(), each)
    }

    fn restore(&mut self, family: Family, table: Table, text: &str) -> Result<(), RestoreError> {
        self.may_write()?;
        self.restore_in(family, &table.to_string(), text)
    }

    fn piece(&self) -> Option<usize> {
        // The legacy variant replaces the table each time.
        self.choice.variant.is_nft().then_some(PIECE)
    }

    fn sets(&mut self) -> Result<BTreeSet<AddressSet>, Error> {
        let Some(ipset) = &self.ipset else {
            return Ok(BTreeSet::new());
        };
        let output = run(ipset, &["list", "-terse", "-output", "save"], "")?;
        match output.success {
            true => Ok(sets::parse(&output.stdout)),
            // Without the kernel's part of it there are none.
            false if !self.features.ipset => Ok(BTreeSet::new()),
            false => Err(run::failed(ipset, &output)),
        }
    }

    fn create_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.change_sets(&sets::creation(sets))
    }

    fn destroy_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.change_sets(&sets::destruction(sets))
    }
}

impl Host {
    /// As [`Tables::restore`], for any table.
    ///
    /// # Errors
    /// Nothing went in.
    pub fn restore_in(&self, family: Family, table: &str, text: &str) -> Result<(), RestoreError> {
        let tool = self.tool(family, "restore")?;
        let output = restore_with(&tool, table, text)?;
        if output.success {
            return Ok(());
        }
        if refusal::is_locked(&output) {
            return Err(RestoreError::Failed(lock::held(LOCK_WAIT_SECONDS)));
        }
        Err(RestoreError::Refused {
            line: refusal::line(&output.stderr),
            message: refusal::message(&output),
        })
    }

    /// As [`Tables::read`], for any table.
    ///
    /// # Errors
    /// The tool could not be run, or failed.
    pub fn read_of(
        &self,
        family: Family,
        table: &str,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        let tool = self.tool(family, "save")?;
        let output = run::by_line(&tool, &["-t", table], each)?;
        match output.success {
            true => Ok(()),
            false => Err(run::failed(&tool, &output)),
        }
    }

    /// As [`Tables::save`], for any table.
    ///
    /// # Errors
    /// As above.
    pub fn save_of(&self, family: Family, table: &str) -> Result<String, Error> {
        whole(|each| self.read_of(family, table, each))
    }

    /// All address sets, whosever they are; none without `ipset`.
    ///
    /// # Errors
    /// The tool could not be run.
    pub fn names_of_sets(&self) -> Result<Vec<String>, Error> {
        let Some(ipset) = &self.ipset else {
            return Ok(Vec::new());
        };
        let output = run(ipset, &["list", "-name"], "")?;
        // Without the kernel's part of it there are none.
        let names = output.stdout.lines().filter(|_| output.success);
        Ok(names.map(str::to_owned).collect())
    }

    /// Destroys a set, unless a rule uses it; says whether it did.
    ///
    /// # Errors
    /// The tool could not be run.
    pub fn destroy_set(&self, name: &str) -> Result<bool, Error> {
        Ok(run(self.ipset()?, &["destroy", name], "")?.success)
    }

    fn change_sets(&self, text: &str) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        self.may_write()?;
        let ipset = self.ipset()?;
        let output = run(ipset, &["-exist", "restore"], text)?;
        match output.success {
            true => Ok(()),
            false => Err(run::failed(ipset, &output)),
        }
    }
}

#[cfg(test)]
mod tests;
