//! A leaf's rule read back: what is dispatched for a Service that nobody has described yet.
//!
//! While a source is incomplete, what was found in the kernel stays. Chains that serve many Services can be written then
//! only if the rules of the others are known. kube-proxy's are read too.

use super::{
    super::{names::ChainName, tables::Table},
    service::HEALTH_CHECK,
    tree::{Leaf, LeafKey, Root, Verdict},
};
use crate::state::{Family, Protocol, ServiceName, ServicePort};

/// What leaves say after the name of their owner.
const WHAT: [&str; 8] = [
    "cluster IP",
    "external IP",
    "loadbalancer IP",
    "node port",
    HEALTH_CHECK,
    "has no endpoints",
    "has no local endpoints",
    "traffic not accepted by its source ranges",
];

/// None if the rule is not for one frontend.
pub(in super::super) fn leaf(
    family: Family,
    table: Table,
    chain: ChainName,
    rule: &str,
) -> Option<(LeafKey, Leaf)> {
    let (before, rest) = rule.split_once("--comment \"")?;
    let (comment, after) = rest.split_once('"')?;
    let words: Vec<&str> = before.split(' ').chain(after.split(' ')).collect();
    let value = |name: &str| {
        words
            .windows(2)
            .find(|pair| pair[0] == name)
            .map(|pair| pair[1])
    };
    let protocol = match value("-p")? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let address = match value("-d") {
        Some(network) => network.split('/').next()?.parse().ok()?,
        None => family.unspecified(),
    };
    let key = LeafKey {
        family,
        root: Root::of(table, chain, address.is_unspecified())?,
        address,
        protocol,
        port: value("--dport")?.parse().ok()?,
    };
    let verdict = match value("-j")? {
        "REJECT" => Verdict::Reject,
        "DROP" => Verdict::Drop,
        "ACCEPT" => Verdict::Accept,
        chain => Verdict::Chain(ChainName::new(chain)?),
    };
    let (owner, what) = comment.split_once(' ').unwrap_or((comment, "node port"));
    let known = WHAT.into_iter().find(|known| *known == what);
    let leaf = Leaf {
        verdict,
        owner: service_port(owner, protocol, family)?,
        what: known.unwrap_or("of another proxy"),
    };
    Some((key, leaf))
}

/// Of "namespace/name:port", or without the port.
fn service_port(text: &str, protocol: Protocol, family: Family) -> Option<ServicePort> {
    let (namespace, rest) = text.split_once('/')?;
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    Some(ServicePort {
        service: ServiceName::new(namespace, name),
        port: port.into(),
        protocol,
        family,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_of_ours_and_of_kube_proxys_are_read_and_other_rules_are_not() {
        let chain = ChainName::fixed("KUBE-SVC-X");
        let read = |table, name, rule| leaf(Family::V4, table, ChainName::fixed(name), rule);
        let (key, found) = read(
            Table::Nat,
            "KUBE-SVC-D-0A6",
            r#"-d 10.96.0.10/32 -p udp -m comment --comment "kube-system/kube-dns:dns cluster IP" -m udp --dport 53 -j KUBE-SVC-X"#,
        )
        .unwrap();
        assert_eq!(key.address, std::net::IpAddr::from([10, 96, 0, 10]));
        assert_eq!(
            (key.root, key.protocol, key.port),
            (Root::Services, Protocol::Udp, 53)
        );
        assert_eq!(found.owner.to_string(), "kube-system/kube-dns:dns");
        assert_eq!(
            (found.verdict, found.what),
            (Verdict::Chain(chain), "cluster IP")
        );
        let (key, found) = read(
            Table::Nat,
            "KUBE-NODEPORTS",
            r#"-p tcp -m comment --comment "default/web" -m tcp --dport 30080 -j KUBE-EXT-X"#,
        )
        .unwrap();
        assert_eq!(
            (key.root, found.owner.to_string().as_str()),
            (Root::NodePorts, "default/web")
        );
        let (key, found) = read(
            Table::Filter,
            "KUBE-EXTERNAL-SERVICES",
            r#"-p tcp -m comment --comment "default/web:http has no endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j REJECT --reject-with icmp-port-unreachable"#,
        )
        .unwrap();
        assert_eq!(
            (key.root, found.verdict),
            (Root::NodePortsRefused, Verdict::Reject)
        );
        for rule in [
            "-d 10.96.0.0/16 -j KUBE-SVC-D-0A60",
            r#"-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"#,
        ] {
            assert_eq!(read(Table::Nat, "KUBE-SERVICES", rule), None);
        }
        assert_eq!(read(Table::Nat, "KUBE-SVC-ABC", "-j RETURN"), None);
    }
}
