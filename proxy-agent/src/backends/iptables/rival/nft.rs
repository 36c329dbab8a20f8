//! kube-proxy's own table of nftables, asked for and removed over netlink: `nft` need not be installed.

use std::io;

use crate::backends::nfnetlink::{ACK, BUFFER_BYTES, Message, Requests, Socket, Writer, kind};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
const GETTABLE: u16 = kind(SUBSYSTEM, 1);
const DELTABLE: u16 = kind(SUBSYSTEM, 2);
/// `NFTA_TABLE_NAME`.
const NAME: u16 = 1;

/// Its name in both families (pkg/proxy/nftables/proxier.go, `kubeProxyTable`).
const TABLE: &[u8] = b"kube-proxy\0";
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const FAMILIES: [u8; 2] = [2, 10];

/// Whether it is there, in either family. Costs microseconds.
///
/// # Errors
/// The kernel has no nfnetlink.
pub fn is_there() -> io::Result<bool> {
    Ok(!families()?.is_empty())
}

/// Removes it with all that is in it; says whether there was one.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn remove() -> io::Result<bool> {
    let families = families()?;
    let mut requests = Requests::default();
    for &family in &families {
        requests.transaction(SUBSYSTEM, |requests| {
            requests.push(DELTABLE, ACK, family, name);
        });
        answer(&requests)?;
        requests.clear();
    }
    Ok(!families.is_empty())
}

fn families() -> io::Result<Vec<u8>> {
    let mut found = Vec::new();
    for family in FAMILIES {
        let mut requests = Requests::default();
        requests.push(GETTABLE, ACK, family, name);
        match answer(&requests) {
            Ok(()) => found.push(family),
            // Also from a kernel without nftables.
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn is_absent(error: &io::Error) -> bool {
    use nix::libc::{EINVAL, ENOENT, EOPNOTSUPP};
    matches!(error.raw_os_error(), Some(ENOENT | EINVAL | EOPNOTSUPP))
}

fn name(writer: &mut Writer<'_>) {
    writer.put(NAME, TABLE);
}

/// Sends `requests`, of which one is to be acknowledged, and waits for that.
fn answer(requests: &Requests) -> io::Result<()> {
    let socket = Socket::open(None)?;
    socket.send(requests)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        for message in socket.receive(&mut buffer)? {
            match message {
                Message::Answer(0) | Message::Done => return Ok(()),
                Message::Answer(errno) => return Err(io::Error::from_raw_os_error(errno)),
                Message::Data { .. } => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::backends::in_namespace::in_namespace;

    #[test]
    #[ignore = "needs root"]
    fn both_tables_are_seen_and_removed_and_no_other_one() {
        in_namespace(|| {
            let nft = |line: &str| {
                let output = Command::new("nft").arg(line).output().unwrap();
                assert!(output.status.success(), "{line}: {output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            assert!(!is_there().unwrap());
            assert!(!remove().unwrap());
            nft("add table ip mine");
            for family in ["ip", "ip6"] {
                nft(&format!("add table {family} kube-proxy"));
                nft(&format!(
                    "add chain {family} kube-proxy services {{ type nat hook prerouting priority -100 ; }}"
                ));
                assert!(is_there().unwrap(), "{family}");
            }
            assert!(remove().unwrap());
            assert!(!is_there().unwrap());
            assert_eq!(nft("list tables").trim(), "table ip mine");
        });
    }
}
