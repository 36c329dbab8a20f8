//! Names, addresses and ports as text, the way the API server accepts them.

use std::{
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU16,
};

use ipnet::IpNet;

use super::problem::shorten;
use crate::state::Protocol;

/// Longest DNS label: a namespace, a Service, a port (RFC 1123).
const LABEL: usize = 63;
/// Longest DNS name: an EndpointSlice, a Node (RFC 1123).
const SUBDOMAIN: usize = 253;

/// Checks a namespace, a Service's name or a port's name.
pub(super) fn label(text: &str) -> Result<(), String> {
    dns(
        text,
        LABEL,
        |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'),
    )
}

/// Checks the name of an EndpointSlice or a Node.
pub(super) fn subdomain(text: &str) -> Result<(), String> {
    dns(
        text,
        SUBDOMAIN,
        |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'),
    )
}

fn dns(text: &str, longest: usize, allowed: fn(u8) -> bool) -> Result<(), String> {
    if text.is_empty() {
        return Err("is missing".into());
    }
    if text.len() > longest {
        return Err(format!(
            "\"{}\" is longer than the {longest} bytes that DNS allows",
            shorten(text)
        ));
    }
    let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    if !text.bytes().all(allowed) || !ends(text.bytes().next()) || !ends(text.bytes().last()) {
        return Err(format!(
            "\"{}\" is not a DNS name of lower-case letters, digits and '-'",
            shorten(text)
        ));
    }
    Ok(())
}

/// An IP address. Leading zeros in IPv4 are decimal and v4-mapped IPv6 is IPv4, as kube-proxy reads them (Go's
/// `ParseIPSloppy`: such objects are still in old clusters).
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    text.parse::<IpAddr>()
        .ok()
        .or_else(|| zero_padded(text))
        .map(|address| address.to_canonical())
        .ok_or_else(|| format!("\"{}\" is not an IP address", shorten(text)))
}

fn zero_padded(text: &str) -> Option<IpAddr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || part.len() > 3 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *octet = part.parse().ok()?;
    }
    parts
        .next()
        .is_none()
        .then(|| Ipv4Addr::from(octets).into())
}

/// A prefix, white space around it ignored, host bits cleared.
pub(super) fn prefix(text: &str) -> Result<IpNet, String> {
    let wrong = || format!("\"{}\" is not a CIDR", shorten(text));
    let (ip, length) = text.trim().split_once('/').ok_or_else(wrong)?;
    let ip = address(ip).map_err(|_| wrong())?;
    let length = length.parse().map_err(|_| wrong())?;
    Ok(IpNet::new(ip, length).map_err(|_| wrong())?.trunc())
}

/// An address that clients can be given.
pub(super) fn vip(text: &str) -> Result<IpAddr, String> {
    let ip = address(text)?;
    let broadcast = IpAddr::V4(Ipv4Addr::BROADCAST);
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip == broadcast {
        return Err(format!(
            "{ip} cannot be a Service's address: it is unspecified, loopback, multicast or broadcast"
        ));
    }
    Ok(ip)
}

/// A port between 1 and 65535.
pub(super) fn port(number: i32) -> Result<NonZeroU16, String> {
    u16::try_from(number)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("{number} is not a port (1-65535)"))
}

/// A transport protocol; TCP if none is given.
pub(super) fn protocol(text: Option<&str>) -> Result<Protocol, String> {
    match text {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!(
            "\"{}\" is not a protocol (TCP, UDP, SCTP)",
            shorten(other)
        )),
    }
}
