//! How many clients session affinity remembers.

use std::{fmt, fs};

use super::{Features, sets::MAX_ENTRIES};

/// Of one list of xt_recent; the kernel's own default is 100.
const LIST: &str = "/sys/module/xt_recent/parameters/ip_list_tot";

/// Room for the clients of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AffinityRoom {
    /// An address set for each endpoint.
    Sets,
    /// A list of xt_recent for each: one client more, and the one that was away longest is forgotten without a word.
    Lists(u32),
    /// None: every connection is free to go anywhere.
    None,
}

impl AffinityRoom {
    /// What a host with these features has.
    pub fn of(features: Features) -> Self {
        let Features { ipset, recent, .. } = features;
        match (ipset, recent) {
            (true, _) => Self::Sets,
            (false, true) => Self::Lists(list_entries(fs::read_to_string(LIST).ok())),
            (false, false) => Self::None,
        }
    }

    /// Clients.
    pub fn clients(self) -> u32 {
        match self {
            Self::Sets => MAX_ENTRIES,
            Self::Lists(clients) => clients,
            Self::None => 0,
        }
    }
}

fn list_entries(parameter: Option<String>) -> u32 {
    parameter
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(100)
}

impl fmt::Display for AffinityRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sets => write!(f, "{MAX_ENTRIES} clients of each endpoint are remembered"),
            Self::Lists(clients) => write!(
                f,
                "without ipset only {clients} clients of each endpoint are remembered, further ones drive others out: install the package ipset, or raise xt_recent's parameter ip_list_tot"
            ),
            Self::None => f.write_str(
                "neither ipset nor xt_recent can be used: no client is remembered; install the package ipset",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_limits_the_clients() {
        let features = |ipset, recent| Features {
            ipset,
            recent,
            ..Features::default()
        };
        assert_eq!(AffinityRoom::of(features(true, true)).clients(), 65_536);
        assert_eq!(AffinityRoom::of(features(false, false)).clients(), 0);
        let lists = AffinityRoom::Lists(list_entries(Some("200\n".to_owned())));
        assert_eq!(lists.clients(), 200);
        assert!(lists.to_string().contains("only 200 clients"), "{lists}");
        assert_eq!(list_entries(None), 100);
    }
}
