//! Which addresses of the node serve node ports: kube-proxy's `nodePortAddresses` (pkg/proxy/util/nodeport_addresses.go).

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;

use super::Family;

/// One entry of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// Every address of the node in this network.
    Network(IpNet),
    /// The main address of the Node object, in each family.
    Primary,
}

impl FromStr for NodePortAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "primary" => Ok(Self::Primary),
            _ => text.parse().map(Self::Network).map_err(|_| {
                format!("{text:?} is neither a network like 192.168.0.0/16 nor `primary`")
            }),
        }
    }
}

impl fmt::Display for NodePortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Primary => f.write_str("primary"),
        }
    }
}

/// The whole list; an empty one stands for every address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortAddresses(Vec<NodePortAddress>);

impl NodePortAddresses {
    /// These entries.
    pub fn new(entries: &[NodePortAddress]) -> Self {
        Self(entries.to_vec())
    }

    /// Whether addresses of the family are told apart. Without an entry for a family all of it serves.
    pub fn restricts(&self, family: Family) -> bool {
        let is_everything = |entry: &NodePortAddress| match entry {
            NodePortAddress::Network(network) => network.prefix_len() == 0,
            NodePortAddress::Primary => false,
        };
        self.mentions(family) && !self.of(family).any(is_everything)
    }

    /// Families that a list which is not empty says nothing of.
    pub fn unmentioned(&self) -> impl Iterator<Item = Family> {
        let families = [Family::V4, Family::V6].into_iter();
        families.filter(|family| !self.0.is_empty() && !self.mentions(*family))
    }

    fn mentions(&self, family: Family) -> bool {
        self.of(family).next().is_some()
    }

    fn of(&self, family: Family) -> impl Iterator<Item = &NodePortAddress> {
        self.0.iter().filter(move |entry| match entry {
            NodePortAddress::Network(network) => Family::of(network.addr()) == family,
            NodePortAddress::Primary => true,
        })
    }

    /// Whether node ports are served on `address`; `primary` are the main addresses of the Node.
    pub fn contains(&self, address: IpAddr, primary: &[IpAddr]) -> bool {
        let family = Family::of(address);
        if !self.restricts(family) {
            return true;
        }
        self.of(family).any(|entry| match entry {
            NodePortAddress::Network(network) => network.contains(&address),
            NodePortAddress::Primary => primary.contains(&address),
        })
    }

    /// Whether 127.0.0.1 is among them.
    pub fn contain_loopback(&self) -> bool {
        self.contains(IpAddr::from([127, 0, 0, 1]), &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> NodePortAddresses {
        let entries = text.split_whitespace();
        let entries: Vec<_> = entries.map(|entry| entry.parse().unwrap()).collect();
        NodePortAddresses::new(&entries)
    }

    #[test]
    fn a_list_holds_for_the_families_that_it_names() {
        let primary: [IpAddr; 2] = ["192.168.0.1", "fd00::1"].map(|ip| ip.parse().unwrap());
        for (text, address, expected) in [
            ("", "203.0.113.1", true),
            ("192.168.0.0/16", "192.168.0.1", true),
            ("192.168.0.0/16", "203.0.113.1", false),
            ("192.168.0.0/16", "fd00::1", true),
            ("192.168.0.0/16 0.0.0.0/0", "203.0.113.1", true),
            ("fd00::/8", "2001:db8::1", false),
            ("fd00::/8", "203.0.113.1", true),
            ("primary", "192.168.0.1", true),
            ("primary", "192.168.0.2", false),
            ("primary", "fd00::1", true),
            ("primary", "fd00::2", false),
            ("primary 203.0.113.0/24", "203.0.113.1", true),
        ] {
            let found = list(text).contains(address.parse().unwrap(), &primary);
            assert_eq!(found, expected, "{address} in {text:?}");
        }
    }

    #[test]
    fn loopback_and_families_left_out_are_known() {
        assert!(list("").contain_loopback());
        assert!(list("127.0.0.0/8").contain_loopback());
        assert!(list("fd00::/8").contain_loopback());
        assert!(!list("192.168.0.0/16").contain_loopback());
        assert!(!list("primary").contain_loopback());
        let unmentioned = |text| list(text).unmentioned().collect::<Vec<_>>();
        assert_eq!(unmentioned("192.168.0.0/16"), [Family::V6]);
        assert_eq!(unmentioned("primary"), []);
        assert_eq!(unmentioned(""), []);
        assert!("192.168.0.1".parse::<NodePortAddress>().is_err());
    }
}
