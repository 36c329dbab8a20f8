//! One rule, written exactly as `iptables-save` prints it, so that what is read back equals what was written.
//!
//! Order and spelling are those of iptables 1.8: addresses with their length, `-m tcp` before a port, `--set-xmark`,
//! probabilities with eleven digits.

use std::{
    fmt::{self, Display},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::names::{ChainName, protocol};
use crate::state::{Family, Protocol};

/// Something that a packet has, or has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Is<T> {
    pub(super) not: bool,
    pub(super) value: T,
}

pub(super) fn is<T>(value: T) -> Option<Is<T>> {
    Some(Is { not: false, value })
}

pub(super) fn is_not<T>(value: T) -> Option<Is<T>> {
    Some(Is { not: true, value })
}

/// A match beside addresses, interface, protocol and port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Match<'a> {
    /// From an address of this node.
    SourceIsLocal,
    /// To an address of this node.
    DestinationIsLocal,
    /// To no address of this node.
    DestinationIsElsewhere,
    /// State of the connection, in the order in which it is printed.
    State(Is<&'static str>),
    /// All bits of the mark are set.
    Mark(Is<u32>),
    /// One packet of so many, on average `hits` of `of`.
    Chance { hits: usize, of: usize },
    /// The source is in this set.
    SourceIn(ChainName, u32),
    /// The source was seen in so many seconds.
    Seen { list: ChainName, seconds: u32 },
    /// Remembers the source.
    See(ChainName),
    /// To this network before it was translated.
    TranslatedFrom(&'a str),
    /// Counts in an accounting object.
    Account(&'a str),
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    /// The packet goes on.
    None,
    Jump(ChainName),
    Return,
    Accept,
    Drop,
    Reject,
    Translate(SocketAddr),
    SetMark(u32),
    FlipMark(u32),
    Masquerade {
        random: bool,
    },
    Remember(ChainName, u32),
}

/// A rule of one family. Everything that is none is not printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule<'a> {
    pub(super) family: Family,
    pub(super) source: Option<Is<IpNet>>,
    pub(super) destination: Option<Is<IpNet>>,
    /// Incoming interface; a trailing `+` stands for any ending.
    pub(super) interface: Option<Is<&'a str>>,
    pub(super) protocol: Option<Protocol>,
    pub(super) comment: Option<fmt::Arguments<'a>>,
    pub(super) matches: &'a [Match<'a>],
    /// First and last destination port; needs a protocol.
    pub(super) ports: Option<(u16, u16)>,
    pub(super) target: Target,
}

impl Rule<'_> {
    /// A rule for every packet.
    pub(super) fn new(family: Family, target: Target) -> Self {
        Self {
            family,
            source: None,
            destination: None,
            interface: None,
            protocol: None,
            comment: None,
            matches: &[],
            ports: None,
            target,
        }
    }
}

/// The network of one address.
pub(super) fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Name of the set of clients that stick to what `chain` stands for: 31 characters at most. Seconds are part of it, because
/// the timeout of a set cannot be changed.
pub(super) fn set_name(chain: ChainName, seconds: u32) -> String {
    format!("{chain}-{seconds}")
}

impl Display for Rule<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            family,
            source,
            destination,
            interface,
            protocol: of_protocol,
            comment,
            matches,
            ports,
            target,
        } = self;
        option(f, "-s", source.filter(|net| net.value.prefix_len() > 0))?;
        option(
            f,
            "-d",
            destination.filter(|net| net.value.prefix_len() > 0),
        )?;
        option(f, "-i", *interface)?;
        option(f, "-p", of_protocol.and_then(|p| is(protocol(p))))?;
        for one in *matches {
            one.write(f, *family)?;
        }
        if let (Some((first, last)), Some(of)) = (ports, of_protocol) {
            write!(f, "-m {} --dport {first}", protocol(*of))?;
            match first == last {
                true => f.write_str(" ")?,
                false => write!(f, ":{last} ")?,
            }
        }
        // Last, since it is a call for the kernel like any other match: only a packet that the rule is for pays for it.
        if let Some(comment) = comment {
            write!(f, "-m comment --comment \"{comment}\" ")?;
        }
        target.write(f, *family)
    }
}

fn option<T: Display>(f: &mut fmt::Formatter<'_>, name: &str, value: Option<Is<T>>) -> fmt::Result {
    match value {
        Some(Is { not, value }) => write!(f, "{}{name} {value} ", if not { "! " } else { "" }),
        None => Ok(()),
    }
}

impl Match<'_> {
    fn write(&self, f: &mut fmt::Formatter<'_>, family: Family) -> fmt::Result {
        let mask = match family {
            Family::V4 => "255.255.255.255",
            Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        };
        match *self {
            Self::SourceIsLocal => f.write_str("-m addrtype --src-type LOCAL "),
            Self::DestinationIsLocal => f.write_str("-m addrtype --dst-type LOCAL "),
            Self::DestinationIsElsewhere => f.write_str("-m addrtype ! --dst-type LOCAL "),
            Self::State(state) => {
                f.write_str("-m conntrack ")?;
                option(f, "--ctstate", Some(state))
            }
            Self::Mark(Is { not, value }) => {
                let not = if not { "! " } else { "" };
                write!(f, "-m mark {not}--mark {value:#x}/{value:#x} ")
            }
            Self::Chance { hits, of } => {
                let probability = probability(hits, of);
                write!(
                    f,
                    "-m statistic --mode random --probability {probability:.11} "
                )
            }
            Self::SourceIn(chain, seconds) => {
                write!(f, "-m set --match-set {} src ", set_name(chain, seconds))
            }
            Self::Seen { list, seconds } => write!(
                f,
                "-m recent --rcheck --seconds {seconds} --reap --name {list} --mask {mask} --rsource "
            ),
            Self::See(list) => {
                write!(f, "-m recent --set --name {list} --mask {mask} --rsource ")
            }
            Self::TranslatedFrom(network) => {
                write!(f, "-m conntrack --ctstate DNAT --ctorigdst {network} ")
            }
            // Two spaces: iptables prints them.
            Self::Account(name) => write!(f, "-m nfacct --nfacct-name  {name} "),
        }
    }
}

/// The kernel keeps probabilities as multiples of 2⁻³¹ (xt_statistic.h), and so they are printed.
fn probability(hits: usize, of: usize) -> f64 {
    const SCALE: f64 = (1_u32 << 31) as f64;
    (hits as f64 / of as f64 * SCALE).round() / SCALE
}

impl Target {
    fn write(self, f: &mut fmt::Formatter<'_>, family: Family) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Return => f.write_str("-j RETURN"),
            Self::Accept => f.write_str("-j ACCEPT"),
            Self::Drop => f.write_str("-j DROP"),
            Self::Reject => match family {
                Family::V4 => f.write_str("-j REJECT --reject-with icmp-port-unreachable"),
                Family::V6 => f.write_str("-j REJECT --reject-with icmp6-port-unreachable"),
            },
            Self::Translate(to) => write!(f, "-j DNAT --to-destination {to}"),
            Self::SetMark(bits) => write!(f, "-j MARK --set-xmark {bits:#x}/{bits:#x}"),
            Self::FlipMark(bits) => write!(f, "-j MARK --set-xmark {bits:#x}/0x0"),
            Self::Masquerade { random } => {
                f.write_str("-j MASQUERADE")?;
                f.write_str(if random { " --random-fully" } else { "" })
            }
            Self::Remember(chain, seconds) => {
                write!(
                    f,
                    "-j SET --add-set {} src --exist",
                    set_name(chain, seconds)
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words are those of iptables-save 1.8.9, legacy and nft variant alike.
    #[test]
    fn rules_are_spelled_as_iptables_save_prints_them() {
        let chain = ChainName::fixed("KUBE-SVC-X");
        let v4 = |target| Rule::new(Family::V4, target);
        let net = |net: &str| net.parse::<IpNet>().unwrap();
        let vip = host([10, 96, 0, 10].into());
        let rules = [
            (
                Rule {
                    source: Some(Is {
                        not: true,
                        value: net("10.244.0.0/16"),
                    }),
                    destination: is(vip),
                    protocol: Some(Protocol::Udp),
                    comment: Some(format_args!("kube-system/kube-dns:dns cluster IP")),
                    ports: Some((53, 53)),
                    ..v4(Target::Jump(chain))
                },
                "! -s 10.244.0.0/16 -d 10.96.0.10/32 -p udp -m udp --dport 53 -m comment --comment \"kube-system/kube-dns:dns cluster IP\" -j KUBE-SVC-X",
            ),
            (
                Rule {
                    protocol: Some(Protocol::Tcp),
                    matches: &[Match::Chance { hits: 1, of: 3 }],
                    ..v4(Target::Translate("10.0.0.1:80".parse().unwrap()))
                },
                "-p tcp -m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination 10.0.0.1:80",
            ),
            (
                Rule {
                    destination: is(host("fd00::1".parse().unwrap())),
                    interface: Some(Is {
                        not: true,
                        value: "veth+",
                    }),
                    protocol: Some(Protocol::Tcp),
                    ports: Some((30_000, 30_015)),
                    ..Rule::new(Family::V6, Target::Reject)
                },
                "-d fd00::1/128 ! -i veth+ -p tcp -m tcp --dport 30000:30015 -j REJECT --reject-with icmp6-port-unreachable",
            ),
            (
                Rule {
                    matches: &[Match::Mark(Is {
                        not: true,
                        value: 0x4000,
                    })],
                    ..v4(Target::Return)
                },
                "-m mark ! --mark 0x4000/0x4000 -j RETURN",
            ),
            (
                v4(Target::FlipMark(0x4000)),
                "-j MARK --set-xmark 0x4000/0x0",
            ),
            (
                Rule {
                    source: is(net("0.0.0.0/0")),
                    matches: &[Match::Seen {
                        list: chain,
                        seconds: 10_800,
                    }],
                    ..v4(Target::Jump(chain))
                },
                "-m recent --rcheck --seconds 10800 --reap --name KUBE-SVC-X --mask 255.255.255.255 --rsource -j KUBE-SVC-X",
            ),
        ];
        for (rule, expected) in rules {
            assert_eq!(rule.to_string(), expected);
        }
    }
}
