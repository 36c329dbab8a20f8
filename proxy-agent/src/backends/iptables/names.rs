//! Names of chains. Those of a Service are kube-proxy's (pkg/proxy/iptables/proxier.go): whoever starts second finds the
//! other's chains under the names of its own.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
    str,
};

use sha2::{Digest as _, Sha256};

use crate::state::{Protocol, ServicePort};

/// Counter of the packets that KUBE-FORWARD drops because conntrack calls them invalid.
pub const INVALID_DROPPED: &str = "ct_state_invalid_dropped_pkts";
/// Counter of the first packets to a node port on 127.0.0.0/8 that were translated.
pub const LOCALHOST_ACCEPTED: &str = "localhost_nps_accepted_pkts";

/// Bytes of a name: `XT_EXTENSION_MAXNAMELEN` without the final zero.
const LENGTH: usize = 28;

/// Name of a chain of ours: up to 28 bytes, padded with zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainName([u8; LENGTH]);

impl ChainName {
    /// None if it is too long for a chain.
    pub const fn new(name: &str) -> Option<Self> {
        let name = name.as_bytes();
        if name.len() > LENGTH {
            return None;
        }
        let mut bytes = [0; LENGTH];
        let mut at = 0;
        while at < name.len() {
            bytes[at] = name[at];
            at += 1;
        }
        Some(Self(bytes))
    }

    /// As new, for names that are known to fit.
    pub(super) const fn fixed(name: &str) -> Self {
        Self::new(name).expect("a name of ours fits")
    }

    /// `prefix` and the first 16 digits of a hash, as kube-proxy makes them.
    fn hashed(prefix: &str, parts: &[&str]) -> Self {
        Self::fixed(&format!("{prefix}{}", hash(parts)))
    }

    /// `prefix` and `identity`, or as much of a hash of the identity as fits.
    pub(super) fn helper(prefix: &str, identity: &str) -> Self {
        Self::new(&format!("{prefix}{identity}")).unwrap_or_else(|| {
            let hash = hash(&[identity]);
            let room = LENGTH - prefix.len();
            Self::fixed(&format!("{prefix}{}", &hash[..room.min(hash.len())]))
        })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0);
        str::from_utf8(&self.0[..end.unwrap_or(LENGTH)]).expect("made of a str")
    }
}

impl Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The first 80 bits of a SHA-256 in base 32 (RFC 4648): `portProtoHash`.
fn hash(parts: &[&str]) -> String {
    const DIGITS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    let digest = hasher.finalize();
    let bits = digest.iter().take(10);
    let bits = bits.fold(0_u128, |bits, byte| bits << 8 | u128::from(*byte));
    let digit = |at: u32| DIGITS[(bits >> (75 - 5 * at)) as usize & 31];
    (0..16).map(|at| char::from(digit(at))).collect()
}

/// "tcp": how iptables, and kube-proxy's hashes, write a protocol.
pub(super) fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The names of one service port.
#[derive(Clone, Debug)]
pub(super) struct ServiceNames {
    port: String,
    protocol: &'static str,
    /// KUBE-SVC-: to one of the cluster's endpoints.
    pub(super) cluster: ChainName,
    /// KUBE-SVL-: to one of this node's endpoints.
    pub(super) local: ChainName,
    /// KUBE-EXT-: from outside, with a policy of Local: who reaches which endpoints.
    pub(super) external: ChainName,
    /// KUBE-FW-: source ranges, before the chain for what comes from outside.
    pub(super) firewall: ChainName,
}

impl ServiceNames {
    pub(super) fn new(key: &ServicePort) -> Self {
        let port = key.to_string();
        let protocol = protocol(key.protocol);
        let hash = hash(&[&port, protocol]);
        let name = |prefix| ChainName::fixed(&format!("{prefix}{hash}"));
        Self {
            cluster: name("KUBE-SVC-"),
            local: name("KUBE-SVL-"),
            external: name("KUBE-EXT-"),
            firewall: name("KUBE-FW-"),
            port,
            protocol,
        }
    }

    /// KUBE-SEP-: one endpoint.
    pub(super) fn endpoint(&self, endpoint: SocketAddr) -> ChainName {
        let endpoint = endpoint.to_string();
        ChainName::hashed("KUBE-SEP-", &[&self.port, self.protocol, &endpoint])
    }

    /// A chain for a group of the endpoints below `chain`, or, with the prefix of a set, the clients of that group.
    pub(super) fn group(&self, prefix: &str, of: &dyn Display, path: &str) -> ChainName {
        let of = of.to_string();
        ChainName::hashed(prefix, &[&self.port, self.protocol, "/", &of, "/", path])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Family, ServiceName};

    fn names(namespace: &str, name: &str, port: &str, protocol: Protocol) -> ServiceNames {
        ServiceNames::new(&ServicePort {
            service: ServiceName::new(namespace, name),
            port: port.into(),
            protocol,
            family: Family::V4,
        })
    }

    /// The first two are in every cluster; the rest was computed with kube-proxy's algorithm.
    #[test]
    fn names_are_those_of_kube_proxy() {
        let api = names("default", "kubernetes", "https", Protocol::Tcp);
        assert_eq!(api.cluster.as_str(), "KUBE-SVC-NPX46M4PTMTKRN6Y");
        let dns = names("kube-system", "kube-dns", "dns", Protocol::Udp);
        assert_eq!(dns.cluster.as_str(), "KUBE-SVC-TCOU7JCQXEZGVUNU");
        let unnamed = names("default", "web", "", Protocol::Tcp);
        assert_eq!(unnamed.local.as_str(), "KUBE-SVL-LOLE4ISW44XBNF3G");
        let service = names("ns1", "svc1", "p80", Protocol::Tcp);
        assert_eq!(service.external.as_str(), "KUBE-EXT-XPGD46QRK7WJZT7O");
        assert_eq!(service.firewall.as_str(), "KUBE-FW-XPGD46QRK7WJZT7O");
        for (endpoint, name) in [
            ("10.180.0.1:80", "KUBE-SEP-SXIVWICOYRO3J4NJ"),
            ("[fd00::1]:80", "KUBE-SEP-T5UNFIPVCZXM3U7X"),
        ] {
            let endpoint = endpoint.parse().unwrap();
            assert_eq!(service.endpoint(endpoint).as_str(), name);
        }
    }

    #[test]
    fn a_name_that_does_not_fit_is_hashed() {
        let short = ChainName::helper("KUBE-SVC-D-", "0A6");
        assert_eq!(short.as_str(), "KUBE-SVC-D-0A6");
        let long = ChainName::helper("KUBE-SVC-D-", "FD000000000000000000");
        assert_eq!(long.as_str().len(), 27);
        let longest = ChainName::helper("PROXY-AGENT-C-", "FD000000000000000000");
        assert_eq!(longest.as_str().len(), 28);
        assert_eq!(ChainName::new(&"x".repeat(29)), None);
    }
}
