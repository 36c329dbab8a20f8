//! The addresses of this node's links, by netlink, followed live.
//!
//! Every message of the address groups leads to a new dump, so that lost ones (the kernel says so) do no harm. Sees the
//! network namespace of the thread that calls [`start`].

use std::{collections::BTreeSet, io, net::IpAddr, thread, time::Duration};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, MulticastGroup, new_connection, new_multicast_connection,
    packet_route::address::{AddressAttribute, AddressFlags, AddressMessage},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::model::Update;

/// A burst of changes is over when nothing came for this long.
const QUIET: Duration = Duration::from_millis(10);
/// Longest wait for the end of a burst.
const BURST: Duration = Duration::from_millis(200);
/// Wait after netlink failed.
const RETRY: Duration = Duration::from_secs(1);
/// kube-proxy's ipvs mode assigns every ClusterIP to this link; they are no addresses of the node.
const IPVS_LINK: &str = "kube-ipvs0";

/// Why the node's addresses cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No thread, socket or subscription.
    #[error("cannot follow the node's addresses by netlink: {0}")]
    Socket(io::Error),
    /// The dump failed.
    #[error("cannot list the node's addresses by netlink: {0}")]
    Dump(rtnetlink::Error),
}

/// Starts to follow the addresses on a thread of its own, which ends when nobody takes updates any more. The first update
/// comes at once.
///
/// # Errors
/// There is no thread to be had.
pub fn start(updates: mpsc::Sender<Update>) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Socket)?;
    let run = move || {
        runtime.block_on(async {
            while !updates.is_closed() {
                if let Err(error) = follow(&updates).await {
                    tracing::warn!(%error, "the node's addresses stay as they were; trying again");
                    sleep(RETRY).await;
                }
            }
        });
    };
    let thread = thread::Builder::new().name("addresses".into());
    thread.spawn(run).map_err(Error::Socket)?;
    Ok(())
}

/// Sends the addresses, and again whenever they change, until nobody takes them or netlink fails.
async fn follow(updates: &mpsc::Sender<Update>) -> Result<(), Error> {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    // Subscribed before the dump: what changes meanwhile leads to another one.
    let (events, _, mut changes) = new_multicast_connection(&groups).map_err(Error::Socket)?;
    let (requests, handle, _) = new_connection().map_err(Error::Socket)?;
    let tasks = [tokio::spawn(events), tokio::spawn(requests)];
    let mut sent = None;
    let result = loop {
        let addresses = match dump(&handle).await {
            Ok(addresses) => addresses,
            Err(error) => break Err(error),
        };
        if sent.as_ref() != Some(&addresses) {
            if updates
                .send(Update::Addresses(addresses.clone()))
                .await
                .is_err()
            {
                break Ok(());
            }
            sent = Some(addresses);
        }
        tokio::select! {
            change = changes.next() => {
                if change.is_none() {
                    break Err(Error::Socket(io::Error::other("the socket was closed")));
                }
            }
            () = updates.closed() => break Ok(()),
        }
        let burst = async { while let Ok(Some(_)) = timeout(QUIET, changes.next()).await {} };
        // Over or not, the addresses must not grow older than this.
        let _: Result<(), _> = timeout(BURST, burst).await;
    };
    for task in tasks {
        task.abort();
    }
    result
}

async fn dump(handle: &Handle) -> Result<BTreeSet<IpAddr>, Error> {
    let messages = handle.address().get().execute();
    let messages: Vec<AddressMessage> = messages.try_collect().await.map_err(Error::Dump)?;
    Ok(messages.iter().filter_map(own_address).collect())
}

/// The address of a message, if connections to it reach this node from outside or from its pods.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    let mut local = None;
    let mut has_failed = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            // On a point-to-point link the other attribute is the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(flags) => has_failed = flags.contains(AddressFlags::Dadfailed),
            _ => {}
        }
    }
    let is_ipvs = || {
        nix::net::if_::if_indextoname(message.header.index)
            .is_ok_and(|name| name.as_bytes() == IPVS_LINK.as_bytes())
    };
    local
        .or(address)
        .filter(|ip| !ip.is_loopback() && !has_failed && !is_ipvs())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use nix::sched::{CloneFlags, unshare};
    use rtnetlink::{LinkUnspec, LinkVeth};

    use super::*;

    fn message(attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.attributes = attributes;
        message
    }

    #[test]
    fn the_own_end_of_a_point_to_point_link_counts() {
        let [own, peer] =
            [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)].map(IpAddr::from);
        let both = [
            AddressAttribute::Address(peer),
            AddressAttribute::Local(own),
        ];
        assert_eq!(own_address(&message(both.to_vec())), Some(own));
        assert_eq!(
            own_address(&message(vec![AddressAttribute::Address(own)])),
            Some(own)
        );
    }

    #[test]
    fn loopback_and_duplicate_addresses_do_not_count() {
        let loopback = AddressAttribute::Address(Ipv6Addr::LOCALHOST.into());
        assert_eq!(own_address(&message(vec![loopback])), None);
        let address = AddressAttribute::Address("fd00::1".parse().unwrap());
        let failed = AddressAttribute::Flags(AddressFlags::Dadfailed);
        assert_eq!(own_address(&message(vec![address, failed])), None);
    }

    /// Adds a link called `name` with `address`.
    async fn add(handle: &Handle, name: &str, address: &str) -> u32 {
        handle
            .link()
            .add(LinkVeth::new(name, &format!("x{name}")).build())
            .execute()
            .await
            .unwrap();
        let mut links = handle.link().get().match_name(name).execute();
        let index = links.try_next().await.unwrap().unwrap().header.index;
        handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await
            .unwrap();
        let address = address.parse().unwrap();
        handle
            .address()
            .add(index, address, 24)
            .execute()
            .await
            .unwrap();
        index
    }

    /// The updates until `expected` is among the IPv4 addresses or no longer is.
    async fn wait(updates: &mut mpsc::Receiver<Update>, expected: &[&str]) {
        let deadline = Duration::from_secs(10);
        let expected: BTreeSet<IpAddr> = expected.iter().map(|ip| ip.parse().unwrap()).collect();
        loop {
            let update = timeout(deadline, updates.recv())
                .await
                .expect("an update in time");
            let Some(Update::Addresses(addresses)) = update else {
                panic!("{update:?}");
            };
            let v4: BTreeSet<IpAddr> = addresses.into_iter().filter(IpAddr::is_ipv4).collect();
            if v4 == expected {
                return;
            }
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn addresses_are_followed_without_those_of_ipvs() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().unwrap();
            tokio::spawn(connection);
            let (sender, mut updates) = mpsc::channel(1);
            start(sender).unwrap();
            wait(&mut updates, &[]).await;
            let index = add(&handle, "one", "192.0.2.1").await;
            wait(&mut updates, &["192.0.2.1"]).await;
            add(&handle, IPVS_LINK, "10.96.0.1").await;
            add(&handle, "two", "192.0.2.2").await;
            wait(&mut updates, &["192.0.2.1", "192.0.2.2"]).await;
            handle.link().del(index).execute().await.unwrap();
            wait(&mut updates, &["192.0.2.2"]).await;
        });
    }
}
