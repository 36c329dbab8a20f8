//! kube-proxy's flags that have no meaning here (cmd/kube-proxy/app/options.go, v1.36): taken, so that its command lines
//! work, and told.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

const NO_IPVS: &str = "no mode uses ipvs";
const FEW_REQUESTS: &str = "its requests are few, and in JSON";
const LOGS: &str = "--log-level and --log-format say what is logged";

/// Name, whether a value follows that is no boolean, and why it means nothing.
const FLAGS: [(&str, bool, &str); 24] = [
    ("ipvs-sync-period", true, NO_IPVS),
    ("ipvs-min-sync-period", true, NO_IPVS),
    ("ipvs-scheduler", true, NO_IPVS),
    ("ipvs-exclude-cidrs", true, NO_IPVS),
    ("ipvs-strict-arp", false, NO_IPVS),
    ("ipvs-tcp-timeout", true, NO_IPVS),
    ("ipvs-tcpfin-timeout", true, NO_IPVS),
    ("ipvs-udp-timeout", true, NO_IPVS),
    ("kube-api-content-type", true, FEW_REQUESTS),
    ("kube-api-burst", true, FEW_REQUESTS),
    ("kube-api-qps", true, FEW_REQUESTS),
    (
        "feature-gates",
        true,
        "its features have flags, and none is a gate of Kubernetes",
    ),
    ("profiling", false, "it is no Go program"),
    (
        "show-hidden-metrics-for-version",
        true,
        "it hides no metrics",
    ),
    (
        "config-sync-period",
        true,
        "nothing has to be refreshed: objects are followed and not stored",
    ),
    ("proxy-port-range", true, "it opens no ports for Services"),
    ("vmodule", true, LOGS),
    ("log-flush-frequency", true, LOGS),
    ("log-text-split-stream", false, LOGS),
    ("log-text-info-buffer-size", true, LOGS),
    ("log-json-split-stream", false, LOGS),
    ("log-json-info-buffer-size", true, LOGS),
    ("boot-id-file", true, "it does not report the machine"),
    ("machine-id-file", true, "it does not report the machine"),
];

/// Those that were given, with the reason why they mean nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meaningless(pub Vec<(&'static str, &'static str)>);

impl Args for Meaningless {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, (name, has_value, _)| {
            let flag = Arg::new(*name)
                .long(*name)
                .hide(true)
                .action(ArgAction::Append);
            command.arg(match has_value {
                true => flag,
                false => flag
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true"),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Meaningless {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = FLAGS.iter().filter(|(name, ..)| matches.contains_id(name));
        Ok(Self(given.map(|(name, _, why)| (*name, *why)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
