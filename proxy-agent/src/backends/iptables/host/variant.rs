//! Which of the two variants of `iptables` this host uses: rules in both would be walked twice, in an order that nobody
//! controls.

use std::{fmt, fs, path::PathBuf};

use super::run::{failed, find, run};
use crate::{backends::Error, state::Family};

/// Chains by which kubelet tells others where it writes: KUBE-IPTABLES-HINT since 1.24 (KEP-3178), its canary before.
const KUBELET: [&str; 2] = [":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY "];
/// A table that has them, and is short: those of Services take seconds to read.
pub(super) const SHORT: &str = "mangle";

/// A variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// `iptables-nft-…`: rules are nftables' in the kernel.
    Nft,
    /// `iptables-legacy-…`: whole tables are replaced, under a lock.
    Legacy,
    /// The only one that there is, called just `iptables`: of the nft kind, or not.
    Unnamed {
        /// It is of the nft kind.
        is_nft: bool,
    },
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.is_nft() {
            true => "nft",
            false => "legacy",
        })
    }
}

impl Variant {
    /// Whether its rules are nftables' in the kernel.
    pub fn is_nft(self) -> bool {
        matches!(self, Self::Nft | Self::Unnamed { is_nft: true })
    }

    fn tool_name(self, family: Family, verb: &str) -> String {
        let prefix = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        match self {
            Self::Nft => format!("{prefix}-nft-{verb}"),
            Self::Legacy => format!("{prefix}-legacy-{verb}"),
            Self::Unnamed { .. } => format!("{prefix}-{verb}"),
        }
    }

    /// The program that does `verb` ("save", "restore").
    ///
    /// # Errors
    /// It is not installed.
    pub fn tool(self, family: Family, verb: &str) -> Result<PathBuf, Error> {
        let name = self.tool_name(family, verb);
        find(&name).ok_or_else(|| missing(&name))
    }

    fn is_installed(self) -> bool {
        [Family::V4, Family::V6]
            .iter()
            .any(|family| self.tool(*family, "restore").is_ok())
    }
}

/// The program that an admin calls.
///
/// # Errors
/// It is not installed.
pub fn default_tool() -> Result<PathBuf, Error> {
    find("iptables").ok_or_else(|| missing("iptables"))
}

fn missing(name: &str) -> Error {
    Error::Unusable(format!(
        "{name} is not in PATH: install the package iptables"
    ))
}

/// What was chosen.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The variant.
    pub variant: Variant,
    /// Why.
    pub why: String,
    /// Version of its tools: "1.8.9".
    pub version: String,
    /// Rules of Services are in the other variant.
    pub stale: Option<Stale>,
}

/// Rules of Services in a variant that nobody keeps: the kernel obeys them as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// The variant that is kept.
    pub kept: Variant,
    /// The one that holds them.
    pub holds: Variant,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kept, holds } = self;
        write!(
            f,
            "iptables-{holds} holds rules of Services that nobody updates, since this node's are kept in iptables-{kept}: \
            packets meet both. When nothing else writes there, remove them: iptables-{holds}-save | grep -vE \
            'KUBE-|PROXY-AGENT-' | iptables-{holds}-restore; and the same with ip6tables-{holds}"
        )
    }
}

/// Looks where this host's rules are.
///
/// # Errors
/// No tools, or none that work.
pub fn choose() -> Result<Choice, Error> {
    let default = default_tool()?;
    let output = run(&default, &["-V"], "")?;
    if !output.success {
        return Err(failed(&default, &output));
    }
    let version = version(&output.stdout)?;
    let default_is_nft = output.stdout.contains("nf_tables");
    let both = Variant::Nft.is_installed() && Variant::Legacy.is_installed();
    if !both {
        return Ok(Choice {
            variant: Variant::Unnamed {
                is_nft: default_is_nft,
            },
            why: "it is the only one installed".to_owned(),
            version,
            stale: None,
        });
    }
    // Asking for legacy tables makes the kernel load them, so it is not asked where there are none.
    let legacy = match legacy_is_in_use() {
        true => saved(Variant::Legacy, None)?,
        false => String::new(),
    };
    let nft = saved(Variant::Nft, Some(SHORT))?;
    let nft = match is_kubelets(&nft) && !is_kubelets(&legacy) {
        true => nft,
        false => saved(Variant::Nft, None)?,
    };
    let (variant, why) = judge(&nft, &legacy, default_is_nft);
    Ok(Choice {
        variant,
        why,
        version,
        stale: stale(variant, &nft, &legacy),
    })
}

/// `iptables v1.8.9 (nf_tables)`
fn version(text: &str) -> Result<String, Error> {
    let found = text.split_whitespace().find_map(|word| {
        let digits = word.strip_prefix('v')?;
        digits
            .starts_with(|c: char| c.is_ascii_digit())
            .then(|| digits.to_owned())
    });
    found.ok_or_else(|| {
        Error::Unusable(format!(
            "iptables -V answers {text:?}, which names no version"
        ))
    })
}

fn is_kubelets(saved: &str) -> bool {
    KUBELET.iter().any(|chain| saved.contains(chain))
}

fn judge(nft: &str, legacy: &str, default_is_nft: bool) -> (Variant, String) {
    let rules = |text: &str| text.lines().filter(|line| line.starts_with("-A")).count();
    match (is_kubelets(nft), is_kubelets(legacy)) {
        (true, false) => (Variant::Nft, "kubelet's chains are there".to_owned()),
        (false, true) => (Variant::Legacy, "kubelet's chains are there".to_owned()),
        (_, _) => match (rules(nft), rules(legacy)) {
            (nft, legacy) if nft > legacy => {
                (Variant::Nft, format!("it has {nft} rules, legacy {legacy}"))
            }
            (nft, legacy) if legacy > nft => {
                (Variant::Legacy, format!("it has {legacy} rules, nft {nft}"))
            }
            (_, _) if default_is_nft => (Variant::Nft, "`iptables` stands for it".to_owned()),
            (_, _) => (Variant::Legacy, "`iptables` stands for it".to_owned()),
        },
    }
}

/// Whether the variant that was not chosen holds rules of Services; an empty chain is none.
fn stale(kept: Variant, nft: &str, legacy: &str) -> Option<Stale> {
    let (holds, other) = match kept.is_nft() {
        true => (Variant::Legacy, legacy),
        false => (Variant::Nft, nft),
    };
    let mut lines = other.lines();
    let has_services = lines.any(|line| line.starts_with("-A KUBE-SERVICES "));
    has_services.then_some(Stale { kept, holds })
}

/// How the tools say that the kernel does not have their variant, or its IPv6 part: then nobody uses it.
const NOT_IN_THE_KERNEL: [&str; 4] = [
    "do you need to insmod?",
    "Protocol not supported",
    "Operation not supported",
    "Address family not supported",
];

/// All tables of the families that can be read, or one of them.
///
/// # Errors
/// A tool failed, and none could be read: nobody knows what is there.
fn saved(variant: Variant, table: Option<&str>) -> Result<String, Error> {
    readable([Family::V4, Family::V6].map(|family| saved_of(variant, family, table)))
}

fn readable(found: [Result<Option<String>, Error>; 2]) -> Result<String, Error> {
    match found {
        [Err(error), Ok(None) | Err(_)] | [Ok(None), Err(error)] => Err(error),
        found => Ok(found.into_iter().flatten().flatten().collect()),
    }
}

/// None where the kernel has no such tables.
fn saved_of(
    variant: Variant,
    family: Family,
    table: Option<&str>,
) -> Result<Option<String>, Error> {
    let tool = variant.tool(family, "save")?;
    let arguments = table.map(|table| ["-t", table]);
    let output = run(&tool, arguments.as_ref().map_or(&[], |of| &of[..]), "")?;
    let said = &output.stderr;
    match output.success {
        true => Ok(Some(output.stdout)),
        false if NOT_IN_THE_KERNEL.iter().any(|text| said.contains(text)) => Ok(None),
        false => Err(failed(&tool, &output)),
    }
}

/// Whether the kernel has tables for legacy tools in the calling thread's network namespace.
fn legacy_is_in_use() -> bool {
    ["ip_tables_names", "ip6_tables_names"].iter().any(|names| {
        // `/proc/net` is that of the process's first thread.
        let names = fs::read_to_string(format!("/proc/thread-self/net/{names}"));
        names.is_ok_and(|names| !names.trim().is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubelets_chains_decide_then_the_number_of_rules_then_the_default() {
        let hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
        let canary = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n";
        let (one, two) = ("-A INPUT -j A\n", "-A INPUT -j A\n-A INPUT -j B\n");
        for (nft, legacy, default_is_nft, expected) in [
            (hint, two, false, Variant::Nft),
            (two, canary, true, Variant::Legacy),
            (two, one, false, Variant::Nft),
            (one, two, true, Variant::Legacy),
            // In both, from another time: the rules decide.
            (hint, canary, true, Variant::Nft),
            (one, one, true, Variant::Nft),
            ("", "", false, Variant::Legacy),
        ] {
            assert_eq!(judge(nft, legacy, default_is_nft).0, expected);
        }
    }

    #[test]
    fn rules_of_services_in_the_other_variant_are_stale() {
        let ours = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j KUBE-NODEPORTS\nCOMMIT\n";
        let empty = "*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n";
        let (nft, legacy) = (Variant::Nft, Variant::Legacy);
        for (kept, in_nft, in_legacy, holds) in [
            (nft, ours, ours, Some(legacy)),
            (legacy, ours, ours, Some(nft)),
            (nft, "", ours, Some(legacy)),
            (nft, ours, empty, None),
            (legacy, "", ours, None),
        ] {
            let found = stale(kept, in_nft, in_legacy);
            assert_eq!(found, holds.map(|holds| Stale { kept, holds }));
        }
        let text = stale(nft, ours, ours).map(|stale| stale.to_string());
        let text = text.unwrap_or_default();
        assert!(
            text.starts_with("iptables-legacy holds") && text.contains("kept in iptables-nft"),
            "{text}"
        );
    }

    #[test]
    fn tables_that_cannot_be_read_are_not_taken_for_empty() {
        let text = |text: &str| Ok(Some(text.to_owned()));
        let failed = || Err(Error::Unusable("no memory".to_owned()));
        for (found, expected) in [
            ([text("a"), text("b")], Some("ab")),
            ([text("a"), Ok(None)], Some("a")),
            ([text("a"), failed()], Some("a")),
            ([failed(), text("b")], Some("b")),
            ([Ok(None), Ok(None)], Some("")),
            ([failed(), Ok(None)], None),
            ([Ok(None), failed()], None),
            ([failed(), failed()], None),
        ] {
            let told = format!("{found:?}");
            assert_eq!(readable(found).ok().as_deref(), expected, "{told}");
        }
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("iptables v1.8.9 (nf_tables)\n").unwrap(), "1.8.9");
        assert_eq!(version("iptables v1.8.2\n").unwrap(), "1.8.2");
        let error = version("busybox").unwrap_err().to_string();
        assert!(error.contains("busybox"), "{error}");
    }
}
