//! kube-proxy's configuration file: read as it reads it, onto the flags, and written from them.
//!
//! The precedence is kube-proxy's (cmd/kube-proxy/app/options.go, v1.36): with a file its flags no longer count, but for the
//! node's name, the API server's address and what is logged. Flags that only we have win over the file.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use self::file::{API_VERSION, KIND, KubeProxyConfiguration};
use crate::{
    cli::{Cli, Command, Listen, Packet, ProxyMode, Run, duration_text},
    state::NodePortAddress,
};

mod apply;
mod file;
mod values;
mod without_effect;
mod write;
mod yaml;

pub use write::{configz, write};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It is no YAML, or not one document.
    #[error("the configuration {} is no YAML: {cause}", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Why, and where.
        cause: serde_yaml_ng::Error,
    },
    /// A field, or what several say together.
    #[error("the configuration {} cannot be used: {what}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The path of the field and what is wrong with it.
        what: String,
    },
    /// Two periods do not go together.
    #[error(
        "--iptables-sync-period, syncPeriod in the configuration ({period}), must be greater than 0, and not less than \
         --iptables-min-sync-period, minSyncPeriod ({least})"
    )]
    Periods {
        /// The longer one.
        period: String,
        /// The shorter one.
        least: String,
    },
    /// It cannot be written.
    #[error("cannot write the configuration to {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// Settles what is in force: reads the file that `--config` names. Says also what of the file and of the flags has no
/// effect, for the log.
///
/// # Errors
/// The file cannot be used.
pub fn settle(mut cli: Cli) -> Result<(Cli, Vec<String>), Error> {
    let (sources, layers) = match &mut cli.command {
        Command::Run(run) => (&mut run.sources, &mut run.layers),
        Command::Check(check) => (&mut check.sources, &mut check.layers),
        Command::Plan(plan) => (&mut plan.sources, &mut plan.layers),
        Command::Dump(_)
        | Command::Explain(_)
        | Command::Cleanup(_)
        | Command::SelfTest { .. }
        | Command::Reap => return Ok((cli, Vec::new())),
    };
    let mut notes = Vec::new();
    let flags = layers.meaningless.0.iter();
    notes.extend(flags.map(|(flag, why)| format!("--{flag} has no effect: {why}")));
    let file = sources.config.as_deref().map(load).transpose()?;
    if let Some((file, doubts)) = &file {
        notes.extend(without_effect::flags(&cli.given));
        notes.extend(doubts.iter().cloned());
        notes.extend(without_effect::fields(file));
        apply::to_global(file, &mut cli.global, &cli.given);
        apply::to_sources(file, sources);
        apply::to_layers(file, layers, &cli.given);
    }
    // As kube-proxy's platformApplyDefaults.
    if layers.proxy_mode == ProxyMode::Nftables && sources.nodeport_addresses.is_empty() {
        sources.nodeport_addresses.push(NodePortAddress::Primary);
    }
    check_periods(&layers.packet)?;
    if let Command::Run(run) = &mut cli.command {
        match &file {
            Some((file, _)) => apply::to_run(file, run, &cli.given),
            None => notes.extend(old_ports(run)),
        }
    }
    Ok((cli, notes))
}

/// The old flags for ports: 0 is no server, and any other is told that it has no effect.
fn old_ports(run: &mut Run) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, port, listen) in [
        ("healthz", run.healthz_port, &mut run.healthz_bind_address),
        ("metrics", run.metrics_port, &mut run.metrics_bind_address),
    ] {
        match port {
            Some(0) => *listen = Listen(None),
            Some(_) => notes.push(format!(
                "--{name}-port has no effect: give the port to --{name}-bind-address"
            )),
            None => {}
        }
    }
    notes
}

fn check_periods(packet: &Packet) -> Result<(), Error> {
    let (period, least) = (packet.iptables_sync_period, packet.iptables_min_sync_period);
    match period.is_zero() || least > period {
        true => Err(Error::Periods {
            period: duration_text(period),
            least: duration_text(least),
        }),
        false => Ok(()),
    }
}

/// The file, and what in it is unknown or there twice.
fn load(path: &Path) -> Result<(KubeProxyConfiguration, Vec<String>), Error> {
    let text = fs::read_to_string(path).map_err(|cause| Error::Read {
        path: path.to_owned(),
        cause,
    })?;
    read(&text).map_err(|wrong| match wrong {
        Wrong::Yaml(cause) => Error::Yaml {
            path: path.to_owned(),
            cause,
        },
        Wrong::Field(what) => Error::Field {
            path: path.to_owned(),
            what,
        },
    })
}

#[derive(Debug)]
enum Wrong {
    Yaml(serde_yaml_ng::Error),
    Field(String),
}

fn read(text: &str) -> Result<(KubeProxyConfiguration, Vec<String>), Wrong> {
    if text.trim().is_empty() {
        return Err(Wrong::Field("it is empty".to_owned()));
    }
    let (value, twice) = yaml::read(text).map_err(Wrong::Yaml)?;
    if !value.is_object() {
        return Err(Wrong::Field(format!("it has no fields: {value}")));
    }
    let mut unknown = BTreeSet::new();
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(&value, &mut track);
    let file: Result<KubeProxyConfiguration, _> =
        serde_ignored::deserialize(deserializer, |path| {
            // A question mark stands for a field that may be absent.
            unknown.insert(path.to_string().replace(".?", ""));
        });
    let file = file.map_err(|error| Wrong::Field(format!("{}: {error}", track.path())))?;
    let expect = |field, found: &str, expected| match found == expected {
        true => Ok(()),
        false => Err(Wrong::Field(format!(
            "{field}: it is {found:?} and not {expected:?}; is this the file config.conf of the ConfigMap kube-proxy?"
        ))),
    };
    expect("kind", &file.kind, KIND)?;
    expect("apiVersion", &file.api_version, API_VERSION)?;
    apply::check(&file).map_err(Wrong::Field)?;
    let twice = twice.iter();
    let twice = twice.map(|path| format!("{path} is there more than once: the last one counts"));
    let unknown = unknown.iter();
    let unknown = unknown.map(|path| format!("{path} is unknown, and ignored"));
    Ok((file, twice.chain(unknown).collect()))
}

#[cfg(test)]
mod tests;
