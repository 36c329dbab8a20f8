//! A rule read back: what a kernel would match and do. Every word that it does not know is an error.

use std::net::SocketAddr;

use ipnet::IpNet;

use crate::state::Protocol;

/// What a packet has, or with false, has not.
pub(super) type Is<T> = (bool, T);

/// What may follow a `!`.
const NEGATED: [&str; 7] = [
    "-s",
    "-d",
    "-i",
    "--ctorigdst",
    "--ctstate",
    "--mark",
    "--dst-type",
];

/// A rule. Matches that are none match every packet.
#[derive(Clone, Debug, Default)]
pub(super) struct Parsed {
    pub(super) source: Option<Is<IpNet>>,
    pub(super) destination: Option<Is<IpNet>>,
    /// Before it was translated.
    pub(super) first_destination: Option<Is<IpNet>>,
    /// Incoming; a trailing `+` stands for any ending.
    pub(super) interface: Option<Is<String>>,
    pub(super) protocol: Option<Protocol>,
    /// First and last destination port.
    pub(super) ports: Option<(u16, u16)>,
    pub(super) states: Option<Is<Vec<String>>>,
    /// These bits of the mark are set.
    pub(super) mark: Option<Is<u32>>,
    pub(super) source_is_local: bool,
    pub(super) destination_is_local: Option<bool>,
    /// Share of the packets.
    pub(super) probability: Option<f64>,
    /// A set that holds the source.
    pub(super) set: Option<String>,
    /// A list of xt_recent that holds the source.
    pub(super) seen: Option<String>,
    /// A list of xt_recent that takes the source.
    pub(super) sees: Option<String>,
    pub(super) target: Target,
}

/// What a rule does.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Target {
    #[default]
    None,
    /// Or a target without options that is not known.
    Chain(String),
    Return,
    Accept,
    Drop,
    Reject,
    Translate(SocketAddr),
    /// Bits to clear, then bits to flip.
    Mark(u32, u32),
    Masquerade,
    /// Adds the source to a set.
    Remember(String),
}

fn words(rule: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, part) in rule.split('"').enumerate() {
        match at % 2 {
            0 => found.extend(part.split_whitespace().map(str::to_owned)),
            _ => found.push(part.to_owned()),
        }
    }
    found
}

fn number(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0x").ok_or(format!("mark {text}"))?;
    u32::from_str_radix(digits, 16).map_err(|error| format!("{text}: {error}"))
}

fn pair(text: &str) -> Result<(u32, u32), String> {
    let (a, b) = text.split_once('/').ok_or(format!("mark {text}"))?;
    Ok((number(a)?, number(b)?))
}

fn net(text: &str, full: bool) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| format!("network {text}"))?;
    match net == net.trunc() && (net.prefix_len() > 0 || full) {
        true => Ok(net),
        false => Err(format!("network {text} is printed otherwise")),
    }
}

/// Whether addresses of this kind are local ones; rules of ours ask for no others.
fn local(kind: &str) -> Result<(), String> {
    match kind {
        "LOCAL" => Ok(()),
        other => Err(format!("addresses of type {other}")),
    }
}

impl Parsed {
    /// Reads what `iptables-save` prints after the name of the chain.
    ///
    /// # Errors
    /// A word that is not known, or that no rule of ours has so.
    pub(super) fn new(rule: &str) -> Result<Self, String> {
        let mut parsed = Self::default();
        let words = words(rule);
        let mut words = words.iter().map(String::as_str);
        let mut holds = true;
        while let Some(word) = words.next() {
            if !holds && !NEGATED.contains(&word) {
                return Err(format!("! {word}"));
            }
            let mut next = || words.next().ok_or(format!("{word} lacks a value"));
            match word {
                "!" => {
                    holds = false;
                    continue;
                }
                "-s" => parsed.source = Some((holds, net(next()?, false)?)),
                "-d" => parsed.destination = Some((holds, net(next()?, false)?)),
                "--ctorigdst" => parsed.first_destination = Some((holds, net(next()?, false)?)),
                "-i" => parsed.interface = Some((holds, next()?.to_owned())),
                "-p" => {
                    parsed.protocol = Some(match next()? {
                        "tcp" => Protocol::Tcp,
                        "udp" => Protocol::Udp,
                        "sctp" => Protocol::Sctp,
                        other => return Err(format!("protocol {other}")),
                    });
                }
                "-m" => match next()? {
                    "comment" | "conntrack" | "mark" | "addrtype" | "statistic" | "set"
                    | "recent" | "nfacct" => {}
                    of @ ("tcp" | "udp" | "sctp") => {
                        let is = parsed.protocol.map(|p| p.to_string().to_lowercase());
                        if is.as_deref() != Some(of) {
                            return Err(format!("-m {of} without -p {of}"));
                        }
                    }
                    other => return Err(format!("match {other}")),
                },
                "--comment" | "--mode" | "--seconds" | "--mask" | "--nfacct-name"
                | "--reject-with" => {
                    next()?;
                }
                "--reap" | "--rsource" | "--random-fully" | "--exist" | "src" => {}
                "--ctstate" => {
                    let states = next()?.split(',').map(str::to_owned).collect();
                    parsed.states = Some((holds, states));
                }
                "--mark" => {
                    let (value, mask) = pair(next()?)?;
                    if value != mask {
                        return Err("a mark of which only some bits are set".to_owned());
                    }
                    parsed.mark = Some((holds, mask));
                }
                "--src-type" => {
                    local(next()?)?;
                    parsed.source_is_local = true;
                }
                "--dst-type" => {
                    local(next()?)?;
                    parsed.destination_is_local = Some(holds);
                }
                "--probability" => {
                    let value = next()?;
                    let chance = value.parse().map_err(|_| format!("chance {value}"))?;
                    parsed.probability = Some(chance);
                }
                "--match-set" => parsed.set = Some(next()?.to_owned()),
                "--rcheck" => parsed.seen = Some(String::new()),
                "--set" => parsed.sees = Some(String::new()),
                "--name" => {
                    let name = next()?.to_owned();
                    match (&mut parsed.seen, &mut parsed.sees) {
                        (Some(list), None) | (None, Some(list)) => *list = name,
                        _ => return Err("a list without a purpose".to_owned()),
                    }
                }
                "--dport" => {
                    let value = next()?;
                    let (first, last) = value.split_once(':').unwrap_or((value, value));
                    let port = |text: &str| text.parse().map_err(|_| format!("port {text}"));
                    parsed.ports = Some((port(first)?, port(last)?));
                    parsed.protocol.ok_or("a port without a protocol")?;
                }
                "-j" => {
                    parsed.target = match next()? {
                        "RETURN" => Target::Return,
                        "ACCEPT" => Target::Accept,
                        "DROP" => Target::Drop,
                        "REJECT" => Target::Reject,
                        "MASQUERADE" => Target::Masquerade,
                        "DNAT" | "MARK" | "SET" => Target::None,
                        chain => Target::Chain(chain.to_owned()),
                    }
                }
                "--to-destination" => {
                    let value = next()?;
                    parsed.protocol.ok_or("DNAT to a port without a protocol")?;
                    let to = value.parse().map_err(|_| format!("address {value}"))?;
                    parsed.target = Target::Translate(to);
                }
                "--set-xmark" => {
                    let (value, mask) = pair(next()?)?;
                    parsed.target = Target::Mark(mask, value);
                }
                "--add-set" => parsed.target = Target::Remember(next()?.to_owned()),
                other => return Err(format!("unknown word {other:?}")),
            }
            holds = true;
        }
        match holds {
            true => Ok(parsed),
            false => Err("! before nothing".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_negated_or_asked_otherwise_than_in_our_rules_is_not_read() {
        for rule in [
            "-m addrtype --dst-type BROADCAST -j DROP",
            "-m addrtype --src-type UNICAST -j DROP",
            "-m addrtype ! --src-type LOCAL -j IP-MASQ",
            "! -p tcp -j DROP",
            "-p tcp -m tcp ! --dport 80 -j DROP",
            "-m set ! --match-set friends src -j DROP",
            "-m recent ! --rcheck --name list -j DROP",
            "-j DROP !",
        ] {
            let read = Parsed::new(rule);
            assert!(read.is_err(), "{rule}: {read:?}");
        }
        let source: IpNet = "10.0.0.0/8".parse().unwrap();
        let read = Parsed::new("! -s 10.0.0.0/8 -m addrtype --dst-type LOCAL -j DROP").unwrap();
        assert_eq!(read.source, Some((false, source)));
        let of = |read: &Parsed| (read.source_is_local, read.destination_is_local);
        assert_eq!(of(&read), (false, Some(true)));
        let read = Parsed::new("-m addrtype ! --dst-type LOCAL -j DROP").unwrap();
        assert_eq!(of(&read), (false, Some(false)));
    }
}
