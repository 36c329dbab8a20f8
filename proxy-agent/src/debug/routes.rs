//! The node's routes: the way to an address, and what that says of who has it.

use std::{collections::BTreeSet, net::IpAddr};

use futures_util::TryStreamExt as _;
use nix::net::if_::if_indextoname;
use rtnetlink::{
    RouteMessageBuilder, new_connection,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

/// The way to an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Name of the interface that it leaves by.
    pub interface: Option<String>,
    /// It leads over a machine between: its address, none if that is told otherwise.
    pub gateway: Option<Option<IpAddr>>,
    /// The source address that the kernel would take.
    pub source: Option<IpAddr>,
}

/// Where an address is, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Behind a link that leads to nothing but what is on this node.
    Inside,
    /// On a link that leads out of the node as well, or nowhere that is known.
    Unclear,
    /// Not on this node.
    Outside,
}

/// Where `address` is by the routes of the calling thread's network namespace, whose own addresses are `own`.
pub fn whereabouts(address: IpAddr, own: &BTreeSet<IpAddr>) -> Whereabouts {
    judge(route_to(address), &uplinks(address.is_ipv4()), |gateway| {
        own.contains(gateway)
    })
}

fn judge(
    route: Option<Route>,
    uplinks: &BTreeSet<String>,
    is_own: impl Fn(&IpAddr) -> bool,
) -> Whereabouts {
    let Some(Route {
        interface,
        gateway,
        source: _,
    }) = route
    else {
        return Whereabouts::Unclear;
    };
    match (gateway, interface) {
        // cilium leads to the node's own pods over an address of the node.
        (Some(gateway), _) if !gateway.as_ref().is_some_and(is_own) => Whereabouts::Outside,
        (_, Some(interface)) if !uplinks.contains(&interface) => Whereabouts::Inside,
        (_, _) => Whereabouts::Unclear,
    }
}

/// Asks the kernel for the way to an address; nothing where there is none.
pub fn route_to(address: IpAddr) -> Option<Route> {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(address, bits)
        .ok()?
        .build();
    ask(message).first().map(Route::of)
}

/// Interfaces that default routes lead out by.
fn uplinks(is_v4: bool) -> BTreeSet<String> {
    let mut message = RouteMessage::default();
    message.header.address_family = match is_v4 {
        true => AddressFamily::Inet,
        false => AddressFamily::Inet6,
    };
    let routes = ask(message);
    let defaults = routes
        .iter()
        .filter(|route| route.header.destination_prefix_length == 0);
    defaults.flat_map(interfaces).collect()
}

/// One, or those of the ways that a route leaves open.
fn interfaces(route: &RouteMessage) -> Vec<String> {
    let mut indices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => indices.push(*index),
            RouteAttribute::MultiPath(hops) => {
                indices.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    indices.into_iter().filter_map(name).collect()
}

fn name(interface: u32) -> Option<String> {
    if_indextoname(interface).ok()?.into_string().ok()
}

/// What the kernel answers; nothing where it refuses.
fn ask(message: RouteMessage) -> Vec<RouteMessage> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let Ok(runtime) = runtime else {
        return Vec::new();
    };
    runtime.block_on(async {
        let Ok((connection, handle, _)) = new_connection() else {
            return Vec::new();
        };
        let connection = tokio::spawn(connection);
        let routes = handle.route().get(message).execute().try_collect().await;
        connection.abort();
        routes.unwrap_or_default()
    })
}

impl Route {
    fn of(message: &RouteMessage) -> Self {
        let ip = |address: &RouteAddress| match address {
            RouteAddress::Inet(v4) => Some(IpAddr::from(*v4)),
            RouteAddress::Inet6(v6) => Some(IpAddr::from(*v6)),
            _ => None,
        };
        let mut route = Self {
            interface: interfaces(message).into_iter().next(),
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)),
                RouteAttribute::Via(_) => route.gateway = Some(None),
                RouteAttribute::PrefSource(address) => route.source = ip(address),
                _ => {}
            }
        }
        route
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_machine_between_is_outside_and_what_is_on_a_pods_link_inside() {
        let own: IpAddr = [10, 244, 1, 1].into();
        let other: IpAddr = [192, 168, 0, 1].into();
        let uplinks = BTreeSet::from(["eth0".to_owned()]);
        for (interface, gateway, expected) in [
            ("cni0", None, Whereabouts::Inside),
            ("cilium_host", Some(Some(own)), Whereabouts::Inside),
            ("eth0", Some(Some(other)), Whereabouts::Outside),
            ("flannel.1", Some(Some(other)), Whereabouts::Outside),
            ("tun0", Some(None), Whereabouts::Outside),
            ("eth0", None, Whereabouts::Unclear),
        ] {
            let route = Route {
                interface: Some(interface.to_owned()),
                gateway,
                source: None,
            };
            let found = judge(Some(route), &uplinks, |gateway| *gateway == own);
            assert_eq!(found, expected, "{interface} {gateway:?}");
        }
        let found = judge(None, &uplinks, |_| false);
        assert_eq!(found, Whereabouts::Unclear);
    }
}
