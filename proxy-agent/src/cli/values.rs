//! Values of flags and arguments, read from their text.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

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

/// Reads and writes the values of flags elsewhere by the same words.
macro_rules! words {
    ($($of:ty),*) => {$(
        impl std::str::FromStr for $of {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                <Self as clap::ValueEnum>::from_str(text, false).map_err(|_| {
                    let words = <Self as clap::ValueEnum>::value_variants().iter();
                    let words: Vec<_> = words.map(|word| format!("{:?}", word.to_string())).collect();
                    format!("must be one of {}", words.join(", "))
                })
            }
        }

        impl std::fmt::Display for $of {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let word = clap::ValueEnum::to_possible_value(self);
                f.write_str(word.as_ref().map_or("", clap::builder::PossibleValue::get_name))
            }
        }
    )*};
}
pub(super) use words;

/// Where a server listens; none for a server that is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub Option<SocketAddr>);

impl Listen {
    /// `ADDRESS:PORT`, an address alone, or nothing.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let address = text.parse::<SocketAddr>().ok();
        let bare = || text.trim_matches(['[', ']']).parse::<IpAddr>().ok();
        let address = address.or_else(|| bare().map(|ip| SocketAddr::new(ip, default_port)));
        match address {
            Some(address) if address.port() > 0 => Ok(Self(Some(address))),
            _ => Err(format!(
                "{text:?} is no ADDRESS:PORT, like 0.0.0.0:{default_port} or [::]:{default_port}"
            )),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |address| write!(f, "{address}"))
    }
}

/// kube-proxy's port for health.
pub const HEALTHZ_PORT: u16 = 10256;
/// kube-proxy's port for metrics.
pub const METRICS_PORT: u16 = 10249;

pub(super) fn healthz_address(text: &str) -> Result<Listen, String> {
    Listen::parse(text, HEALTHZ_PORT)
}

pub(super) fn metrics_address(text: &str) -> Result<Listen, String> {
    Listen::parse(text, METRICS_PORT)
}

/// As Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("use true or false".to_owned()),
    }
}

const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// `1s`, `500ms`, `1h30m`, `1.5h`: Go's durations (`time.ParseDuration`), which must not be negative here.
///
/// # Errors
/// It is none, or too long.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: use 1s, 500ms or 1h30m");
    if text.starts_with('-') {
        return Err(format!("{text:?} must not be negative"));
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut total: u64 = 0;
    loop {
        let is_of_number = |c: char| c.is_ascii_digit() || c == '.';
        let (number, tail) = rest.split_at(rest.find(|c| !is_of_number(c)).ok_or_else(wrong)?);
        let letters = tail.find(is_of_number).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit = UNITS.iter().find(|(name, _)| *name == unit);
        let &(_, unit_ns) = unit.ok_or_else(wrong)?;
        let part = in_nanoseconds(number, unit_ns).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        if tail.is_empty() {
            break;
        }
        rest = tail;
    }
    match i64::try_from(total) {
        Ok(_) => Ok(Duration::from_nanos(total)),
        Err(_) => Err(wrong()),
    }
}

/// A decimal number of units; none if it is no number or too much.
fn in_nanoseconds(number: &str, unit_ns: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: u64 = match whole.is_empty() {
        true => 0,
        false => whole.parse().ok()?,
    };
    let mut total = whole.checked_mul(unit_ns)?;
    let mut place = unit_ns;
    for digit in fraction.chars() {
        place /= 10;
        total = total.checked_add(u64::from(digit.to_digit(10)?) * place)?;
    }
    Some(total)
}

/// As Go writes it (`time.Duration.String`): `24h0m0s`, `1.5s`, `500ms`, `0s`.
pub fn duration_text(duration: Duration) -> String {
    let ns = duration.as_nanos();
    match ns {
        0 => "0s".to_owned(),
        1..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{}\u{b5}s", decimal(ns, 1_000)),
        1_000_000..1_000_000_000 => format!("{}ms", decimal(ns, 1_000_000)),
        _ => {
            let seconds = decimal(ns % 60_000_000_000, 1_000_000_000);
            let minutes = duration.as_secs() / 60;
            match (minutes / 60, minutes % 60) {
                (0, 0) => format!("{seconds}s"),
                (0, minutes) => format!("{minutes}m{seconds}s"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}s"),
            }
        }
    }
}

/// `ns` in units of `unit`, without zeros at the end.
fn decimal(ns: u128, unit: u128) -> String {
    let (whole, rest) = (ns / unit, ns % unit);
    let width = unit.ilog10() as usize;
    let fraction = format!("{rest:0width$}");
    match fraction.trim_end_matches('0') {
        "" => whole.to_string(),
        fraction => format!("{whole}.{fraction}"),
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

    #[test]
    fn durations_are_read_and_written_as_in_go() {
        let ns = |ns: u64| Duration::from_nanos(ns);
        for (text, expected, written) in [
            ("0", ns(0), "0s"),
            ("0s", ns(0), "0s"),
            ("30s", ns(30_000_000_000), "30s"),
            ("24h", ns(86_400_000_000_000), "24h0m0s"),
            ("1h2m", ns(3_720_000_000_000), "1h2m0s"),
            ("1.5h", ns(5_400_000_000_000), "1h30m0s"),
            ("+.5s", ns(500_000_000), "500ms"),
            ("1m1.25s", ns(61_250_000_000), "1m1.25s"),
            ("10.050s", ns(10_050_000_000), "10.05s"),
            ("1500us", ns(1_500_000), "1.5ms"),
            ("7\u{3bc}s", ns(7_000), "7\u{b5}s"),
            ("9ns", ns(9), "9ns"),
        ] {
            let read = duration(text).unwrap();
            assert_eq!(read, expected, "{text}");
            assert_eq!(duration_text(read), written, "{text}");
        }
        for text in [
            "", "1", "s", ".s", "1d", "1h2", "-1s", "1.2.3s", "3000000h", "1 s",
        ] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn servers_listen_at_an_address_with_or_without_a_port_or_nowhere() {
        let listen = |text: &str| healthz_address(text).map(|listen| listen.to_string());
        assert_eq!(listen("127.0.0.1:80").unwrap(), "127.0.0.1:80");
        assert_eq!(listen("::").unwrap(), "[::]:10256");
        assert_eq!(listen("[::1]").unwrap(), "[::1]:10256");
        assert_eq!(listen("").unwrap(), "");
        assert!(listen("localhost:80").is_err() && listen("1.2.3.4:0").is_err());
    }
}
