//! The kernel's table of flows, through ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::{
    Cleaned,
    answers::{Answers, Flow},
};
use crate::{
    backends::nfnetlink::{
        ACK, Attributes, BUFFER_BYTES, DUMP, Message, Requests, Socket, Writer, kind,
    },
    state::{Family, Protocol},
};

const SUBSYSTEM: u8 = 1;
const GET: u16 = kind(SUBSYSTEM, 1);
const DELETE: u16 = kind(SUBSYSTEM, 2);

/// `CTA_*`.
pub(super) const TUPLE_ORIG: u16 = 1;
pub(super) const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const STATUS_MASK: u16 = 26;
/// `CTA_FILTER_ORIG_FLAGS`.
const FILTER_ORIG: u16 = 1;
/// `CTA_FILTER_F_CTA_PROTO_NUM`.
const BY_PROTOCOL: u32 = 1 << 3;
/// `CTA_TUPLE_*`.
pub(super) const TUPLE_IP: u16 = 1;
pub(super) const TUPLE_PROTO: u16 = 2;
/// `CTA_IP_*`.
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
/// `CTA_PROTO_*`.
pub(super) const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// `IPS_SEEN_REPLY` (include/uapi/linux/netfilter/nf_conntrack_common.h).
const SEEN_REPLY: u32 = 1 << 1;

/// Room for the answers to one batch of deletions, bytes.
const ANSWERS_ROOM: usize = 1 << 20;

/// `NFPROTO_*`.
pub(super) fn number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// `IPPROTO_*`.
fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP as u8,
        Protocol::Udp => libc::IPPROTO_UDP as u8,
        Protocol::Sctp => libc::IPPROTO_SCTP as u8,
    }
}

/// Lists the flows, and deletes stale ones while the list goes on.
pub fn clean(
    answers: &Answers,
    family: Family,
    protocol: Protocol,
    total: &mut Cleaned,
) -> io::Result<()> {
    let (list, change) = (Socket::open(None)?, Socket::open(None)?);
    change.set_room(ANSWERS_ROOM)?;
    list.send(&dump(family, protocol))?;
    let (mut buffer, mut replies) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut deletions = Requests::default();
    loop {
        let mut is_done = false;
        for message in list.receive(&mut buffer)? {
            match message {
                Message::Data { attributes, .. } => {
                    let Some(flow) = flow(attributes, protocol) else {
                        continue;
                    };
                    total.seen += 1;
                    if answers.is_stale(&flow) {
                        delete(&mut deletions, family, attributes);
                    }
                }
                Message::Answer(errno) => return Err(io::Error::from_raw_os_error(errno)),
                Message::Done => is_done = true,
            }
        }
        carry_out(&change, family, &mut deletions, &mut replies, total)?;
        if is_done {
            return Ok(());
        }
    }
}

/// Kernels before 5.8 do not know the filter by protocol, those before 5.19 the one by status; they list more.
fn dump(family: Family, protocol: Protocol) -> Requests {
    let mut requests = Requests::default();
    requests.push(GET, DUMP, number(family), |writer| {
        writer.nest(FILTER, |filter| {
            filter.put(FILTER_ORIG, &BY_PROTOCOL.to_ne_bytes());
        });
        writer.nest(TUPLE_ORIG, |tuple| {
            let number = protocol_number(protocol);
            tuple.nest(TUPLE_PROTO, |proto| proto.put(PROTO_NUM, &[number]));
        });
        match protocol {
            Protocol::Udp => {}
            // The answered ones may be a million, and are never stale.
            Protocol::Tcp | Protocol::Sctp => {
                writer.put(STATUS, &0_u32.to_be_bytes());
                writer.put(STATUS_MASK, &SEEN_REPLY.to_be_bytes());
            }
        }
    });
    requests
}

/// A flow is named by its tuple and, as another one may have taken that tuple meanwhile, by its id.
fn delete(requests: &mut Requests, family: Family, of: Attributes<'_>) {
    let copy = |writer: &mut Writer<'_>, kind| {
        if let Some(value) = of.find(kind) {
            writer.put(kind, value);
        }
    };
    requests.push(DELETE, ACK, number(family), |writer| {
        if let Some(tuple) = of.nested(TUPLE_ORIG) {
            writer.copy(TUPLE_ORIG, tuple);
        }
        copy(writer, ZONE);
        copy(writer, ID);
    });
}

fn carry_out(
    socket: &Socket,
    family: Family,
    deletions: &mut Requests,
    replies: &mut [u8],
    total: &mut Cleaned,
) -> io::Result<()> {
    if deletions.is_empty() {
        return Ok(());
    }
    socket.send(deletions)?;
    deletions.clear();
    while let Some(messages) = socket.try_receive(replies)? {
        for message in messages {
            match message {
                Message::Answer(0) => total.deleted.count(family),
                // It has ended by itself.
                Message::Answer(libc::ENOENT) => {}
                Message::Answer(libc::EBUSY) => total.kept += 1,
                Message::Answer(errno) => return Err(io::Error::from_raw_os_error(errno)),
                Message::Data { .. } | Message::Done => {}
            }
        }
    }
    Ok(())
}

/// None if it is of another protocol.
fn flow(attributes: Attributes<'_>, protocol: Protocol) -> Option<Flow> {
    let orig = attributes.nested(TUPLE_ORIG)?;
    if orig.nested(TUPLE_PROTO)?.find(PROTO_NUM)? != [protocol_number(protocol)] {
        return None;
    }
    let reply = attributes.nested(TUPLE_REPLY)?;
    let status = u32::from_be_bytes(*attributes.find(STATUS)?.first_chunk()?);
    Some(Flow {
        protocol,
        to: end(orig, IP_V4_DST, IP_V6_DST, PROTO_DST_PORT)?,
        answered_by: end(reply, IP_V4_SRC, IP_V6_SRC, PROTO_SRC_PORT)?,
        is_answered: status & SEEN_REPLY != 0,
    })
}

/// One end of a tuple.
fn end(tuple: Attributes<'_>, v4: u16, v6: u16, port: u16) -> Option<SocketAddr> {
    let addresses = tuple.nested(TUPLE_IP)?;
    let port = tuple.nested(TUPLE_PROTO)?.u16(port)?;
    let address = match addresses.find(v4) {
        Some(v4) => Ipv4Addr::from(*v4.first_chunk::<4>()?).into(),
        None => Ipv6Addr::from(*addresses.find(v6)?.first_chunk::<16>()?).into(),
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
pub(super) mod creation {
    //! Flows that nobody sent a packet for.

    use std::net::IpAddr;

    use super::*;

    const NEW: u16 = kind(SUBSYSTEM, 0);
    /// `CTA_TIMEOUT`.
    const TIMEOUT: u16 = 7;
    /// `IPS_CONFIRMED`, without which the kernel takes no status.
    const CONFIRMED: u32 = 1 << 3;
    /// `NLM_F_CREATE | NLM_F_EXCL`.
    const CREATE: u16 = 0x600;

    /// Adds a flow from `client` that ends in ten minutes.
    pub fn create(requests: &mut Requests, client: SocketAddr, flow: &Flow) {
        let family = number(Family::of(client.ip()));
        let protocol = protocol_number(flow.protocol);
        requests.push(NEW, CREATE | ACK, family, |writer| {
            tuple(writer, TUPLE_ORIG, client, flow.to, protocol);
            tuple(writer, TUPLE_REPLY, flow.answered_by, client, protocol);
            writer.put(TIMEOUT, &600_u32.to_be_bytes());
            if flow.is_answered {
                writer.put(STATUS, &(SEEN_REPLY | CONFIRMED).to_be_bytes());
            }
        });
    }

    fn tuple(writer: &mut Writer<'_>, kind: u16, from: SocketAddr, to: SocketAddr, protocol: u8) {
        let address = |writer: &mut Writer<'_>, address, v4, v6| match address {
            IpAddr::V4(address) => writer.put(v4, &address.octets()),
            IpAddr::V6(address) => writer.put(v6, &address.octets()),
        };
        writer.nest(kind, |tuple| {
            tuple.nest(TUPLE_IP, |ip| {
                address(ip, from.ip(), IP_V4_SRC, IP_V6_SRC);
                address(ip, to.ip(), IP_V4_DST, IP_V6_DST);
            });
            tuple.nest(TUPLE_PROTO, |proto| {
                proto.put(PROTO_NUM, &[protocol]);
                proto.put(PROTO_SRC_PORT, &from.port().to_be_bytes());
                proto.put(PROTO_DST_PORT, &to.port().to_be_bytes());
            });
        });
    }
}
