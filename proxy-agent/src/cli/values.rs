//! Values of flags and arguments, read from their text.

use std::{net::SocketAddr, str::FromStr, time::Duration};

use crate::state::Protocol;

/// ADDRESS:PORT/PROTO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address and port.
    pub address: SocketAddr,
    /// Protocol, TCP when not given.
    pub protocol: Protocol,
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return Err(format!("unknown protocol {other:?}: use tcp, udp or sctp")),
        };
        let address = address.parse().map_err(
            |_| "expected ADDRESS:PORT/PROTO, like 10.96.0.10:53/udp or [fd00::a]:53/udp",
        )?;
        Ok(Self { address, protocol })
    }
}

/// `1s`, `500ms`, `1h30m`: Go's durations, which kube-proxy's flags have, in whole numbers.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: use 1s, 500ms or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut total, mut rest) = (Duration::ZERO, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let number: u32 = number.parse().map_err(|_| wrong())?;
        let letters = tail.find(|c: char| c.is_ascii_digit());
        let (unit, tail) = tail.split_at(letters.unwrap_or(tail.len()));
        let unit = match unit {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3_600),
            _ => return Err(wrong()),
        };
        total = unit
            .checked_mul(number)
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
        rest = tail;
    }
    match text.is_empty() {
        true => Err(wrong()),
        false => Ok(total),
    }
}

/// A lease, in whole seconds.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(seconds @ 3..=86_400) => Ok(Duration::from_secs(seconds.into())),
        Ok(_) => Err("must be 3 to 86400: the agent renews it every second".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_in_both_families() {
        let read = |text: &str| text.parse::<Destination>();
        assert_eq!(
            read("[fd00::a]:53/UDP").unwrap(),
            Destination {
                address: "[fd00::a]:53".parse().unwrap(),
                protocol: Protocol::Udp
            }
        );
        assert_eq!(read("10.0.0.1:80").unwrap().protocol, Protocol::Tcp);
        assert!(read("10.0.0.1/tcp").is_err() && read("10.0.0.1:80/x").is_err());
    }
}
