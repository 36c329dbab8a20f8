//! Whom the socket layer leaves to the packet layer, whatever is addressed.

use proxy_ebpf::abi::{Meta, meta_flags};

use super::{client::Client, processes::Standing};

/// Why the socket layer does not look at a client's connections; none if it does. `now_ns` is CLOCK_MONOTONIC, `is_attached`
/// says whether the hooks that translate are.
pub fn why(
    meta: &Meta,
    now_ns: u64,
    is_attached: bool,
    client: &Client,
    standing: Standing,
) -> Option<&'static str> {
    let is_expired = meta.lease_ns != 0 && now_ns.saturating_sub(meta.heartbeat_ns) > meta.lease_ns;
    let has = |flag| meta.flags & flag != 0;
    match standing {
        _ if client.is_outside => Some("the client is no socket of this node"),
        Standing::Elsewhere => Some("the client's processes are not below this node's cgroup"),
        _ if !is_attached => Some("the hooks that translate connections are not attached"),
        _ if !has(meta_flags::COMPLETE) => Some("the maps were never filled completely"),
        _ if is_expired => Some("the agent is gone for longer than its lease (--socket-lease)"),
        _ if has(meta_flags::HOST_ONLY) && !client.on_host => {
            Some("with --masquerade-all a pod's sockets are left alone")
        }
        Standing::Excluded => Some("the client's cgroups are excluded (--socket-exclude-cgroup)"),
        Standing::Served | Standing::Unseen | Standing::PartlyExcluded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debug::fixture::{NODE, NOW_NS, POD, contents};

    fn client(on_host: bool) -> Client {
        Client {
            name: "client".to_owned(),
            on_host,
            netns_cookie: Some(if on_host { NODE } else { POD }),
            from_loopback: false,
            address: None,
            namespace: None,
            is_outside: false,
        }
    }

    #[test]
    fn a_client_is_left_for_the_reason_that_holds() {
        let served = contents().meta;
        let expired = Meta {
            lease_ns: 1,
            heartbeat_ns: NOW_NS - 2,
            ..served
        };
        let host_only = Meta {
            flags: served.flags | meta_flags::HOST_ONLY,
            ..served
        };
        let empty = Meta { flags: 0, ..served };
        let ask = |meta: &Meta, client: &Client| {
            why(meta, NOW_NS, true, client, Standing::Served).unwrap_or_default()
        };
        let (host, pod) = (client(true), client(false));
        assert_eq!(ask(&served, &pod), "");
        assert_eq!(ask(&host_only, &host), "");
        for (meta, client, word) in [
            (&host_only, &pod, "--masquerade-all"),
            (&expired, &host, "lease"),
            (&empty, &host, "never filled"),
        ] {
            assert!(ask(meta, client).contains(word), "{word}");
        }
        let outside = Client {
            is_outside: true,
            ..client(false)
        };
        assert!(ask(&served, &outside).contains("no socket of this node"));
        let of =
            |attached, standing| why(&served, NOW_NS, attached, &pod, standing).unwrap_or_default();
        assert!(of(false, Standing::Served).contains("not attached"));
        assert!(of(true, Standing::Excluded).contains("excluded"));
        assert!(of(true, Standing::Elsewhere).contains("cgroup"));
        assert_eq!(of(true, Standing::PartlyExcluded), "");
    }
}
