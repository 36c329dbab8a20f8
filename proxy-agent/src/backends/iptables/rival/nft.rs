//! kube-proxy's own table of nftables, asked for and removed over netlink: `nft` need not be installed.

use std::io;

use crate::backends::nfnetlink::{ACK, Requests, Writer, ask, kind};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
const GETTABLE: u16 = kind(SUBSYSTEM, 1);
const DELTABLE: u16 = kind(SUBSYSTEM, 2);
const GETCHAIN: u16 = kind(SUBSYSTEM, 4);
/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`.
const TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`.
const CHAIN: u16 = 3;

/// Its name in both families (pkg/proxy/nftables/proxier.go, `kubeProxyTable`).
const NAME: &[u8] = b"kube-proxy\0";
/// Its chain that dispatches to Services (`servicesChain`), which is made together with all others.
const SERVICES: &[u8] = b"services\0";
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const FAMILIES: [u8; 2] = [2, 10];

/// In how many of both families it is there and dispatches to Services. Costs microseconds.
///
/// # Errors
/// The kernel has no nfnetlink.
pub fn serving() -> io::Result<usize> {
    let mut count = 0;
    for family in FAMILIES {
        let is_there = has(GETCHAIN, family, |writer| {
            writer.put(TABLE, NAME);
            writer.put(CHAIN, SERVICES);
        });
        count += usize::from(is_there?);
    }
    Ok(count)
}

/// Whether it serves all families that it may have.
pub fn serves_all() -> bool {
    serving().is_ok_and(|count| count == FAMILIES.len())
}

/// Removes it with all that is in it; says whether there was one.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn remove() -> io::Result<bool> {
    let name = |writer: &mut Writer<'_>| writer.put(TABLE, NAME);
    let mut was_there = false;
    for family in FAMILIES {
        if has(GETTABLE, family, name)? {
            let mut requests = Requests::default();
            requests.transaction(SUBSYSTEM, |requests| {
                requests.push(DELTABLE, ACK, family, name);
            });
            ask(&requests, |_| {})?;
            was_there = true;
        }
    }
    Ok(was_there)
}

/// Whether the kernel has what a request asks for.
fn has(kind: u16, family: u8, fill: impl FnOnce(&mut Writer<'_>)) -> io::Result<bool> {
    let mut requests = Requests::default();
    requests.push(kind, ACK, family, fill);
    match ask(&requests, |_| {}) {
        Ok(()) => Ok(true),
        // Also from a kernel without nftables.
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_absent(error: &io::Error) -> bool {
    use nix::libc::{EINVAL, ENOENT, EOPNOTSUPP};
    matches!(error.raw_os_error(), Some(ENOENT | EINVAL | EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::backends::in_namespace::in_namespace;

    #[test]
    #[ignore = "needs root"]
    fn tables_of_both_families_are_seen_and_removed_and_no_other_one() {
        in_namespace(|| {
            let nft = |line: &str| {
                let output = Command::new("nft").arg(line).output().unwrap();
                assert!(output.status.success(), "{line}: {output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            assert_eq!(serving().unwrap(), 0);
            assert!(!remove().unwrap());
            nft("add table ip mine");
            for family in ["ip", "ip6"] {
                nft(&format!("add table {family} kube-proxy"));
                assert_eq!(serving().unwrap(), 0, "empty");
                nft(&format!("add chain {family} kube-proxy services"));
                assert_eq!(serving().unwrap(), 1, "{family}");
                nft(&format!("delete chain {family} kube-proxy services"));
            }
            nft("add chain ip6 kube-proxy services");
            assert!(!serves_all());
            nft("add chain ip kube-proxy services");
            assert!(serves_all());
            assert!(remove().unwrap());
            assert_eq!(serving().unwrap(), 0);
            assert_eq!(nft("list tables").trim(), "table ip mine");
        });
    }
}
