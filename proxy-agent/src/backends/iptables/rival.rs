//! Another proxy on this node: what shows one, and what follows from it over time.
//!
//! Two proxies that write the same chains would destroy each other's rules for ever, so while another one serves, ours are
//! not written. It is known by what it says (`/proxyMode` on kube-proxy's port, without our header) or, when our own agent
//! has that port, by what it does: chains and tables that only kube-proxy makes come back after we removed them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub mod nft;

/// Chain that kube-proxy keeps in each table to learn when somebody flushes its rules (pkg/util/iptables/monitor.go).
pub const CANARY: &str = "KUBE-PROXY-CANARY";
/// The tables with a canary, in the order in which kube-proxy looks at them.
pub const CANARY_TABLES: [&str; 3] = ["mangle", "nat", "filter"];

/// Having served this long, we forget that another proxy came back before.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Longest wait for a sign of another proxy that has come back again and again.
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// What shows another proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sign {
    /// It answers `/proxyMode`.
    ProxyMode,
    /// Table `kube-proxy` of nftables came back, and dispatches to Services.
    NftTable,
    /// The chain KUBE-PROXY-CANARY came back.
    Canary,
    /// Rules of kube-proxy's form came back where ours were.
    Rules,
}

impl Sign {
    /// All of them, the surest first.
    pub const ALL: [Self; 4] = [Self::ProxyMode, Self::NftTable, Self::Canary, Self::Rules];

    /// For metrics and the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::ProxyMode => "proxy_mode",
            Self::NftTable => "nft_table",
            Self::Canary => "canary",
            Self::Rules => "rules",
        }
    }
}

/// What is there at one moment, whoever made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Somebody else answers `/proxyMode`.
    pub proxy_mode: bool,
    /// See [`Sign::NftTable`].
    pub nft_table: bool,
    /// See [`Sign::Canary`].
    pub canary: bool,
    /// See [`Sign::Rules`].
    pub rules: bool,
}

impl Seen {
    /// What of it shows a proxy at work. What it may have left behind counts only once we have removed it.
    fn sign(self, is_cleared: bool) -> Option<Sign> {
        let shows = |sign: &Sign| match sign {
            Sign::ProxyMode => self.proxy_mode,
            Sign::NftTable => is_cleared && self.nft_table,
            Sign::Canary => is_cleared && self.canary,
            Sign::Rules => is_cleared && self.rules,
        };
        Sign::ALL.into_iter().find(shows)
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stance {
    /// Nobody else serves this node.
    Serve,
    /// Another proxy does.
    Observe(Sign),
}

/// Decides from what is seen over time. Pure: time is an argument.
#[derive(Debug)]
pub struct Decision {
    stance: Stance,
    /// Our rules are in force and what another proxy left is removed: it does not come back by itself.
    is_cleared: bool,
    /// Without a sign for so long, another proxy is taken to be gone.
    patience: Duration,
    first_patience: Duration,
    last_sign: Option<Instant>,
    /// End of the last observation.
    took_over: Option<Instant>,
}

impl Decision {
    /// Begins to serve; another proxy is gone when it has given no sign for `patience`.
    pub fn new(patience: Duration) -> Self {
        Self {
            stance: Stance::Serve,
            is_cleared: false,
            patience,
            first_patience: patience,
            last_sign: None,
            took_over: None,
        }
    }

    /// What was decided last.
    pub fn stance(&self) -> Stance {
        self.stance
    }

    /// Takes in what is seen at `now`.
    pub fn look(&mut self, now: Instant, seen: Seen) -> Stance {
        match self.stance {
            Stance::Serve => {
                if let Some(sign) = seen.sign(self.is_cleared) {
                    self.observe(now, sign);
                }
            }
            Stance::Observe(_) => {
                if seen.proxy_mode {
                    self.last_sign = Some(now);
                }
                let is_quiet = self
                    .last_sign
                    .is_none_or(|last| now.saturating_duration_since(last) >= self.patience);
                if is_quiet {
                    self.stance = Stance::Serve;
                    self.took_over = Some(now);
                }
            }
        }
        self.stance
    }

    /// One that comes back each time we take over gets more time each time: a fight, if it is one, ends slow.
    fn observe(&mut self, now: Instant, sign: Sign) {
        let has_come_back = self
            .took_over
            .is_some_and(|at| now.saturating_duration_since(at) < FORGET_AFTER);
        self.patience = match has_come_back {
            true => (self.patience * 2).min(LONGEST_PATIENCE.max(self.first_patience)),
            false => self.first_patience,
        };
        self.stance = Stance::Observe(sign);
        self.is_cleared = false;
        self.last_sign = Some(now);
    }

    /// Whether what another proxy left is still to be removed.
    pub fn wants_clearing(&self) -> bool {
        self.stance == Stance::Serve && !self.is_cleared
    }

    /// Our rules are in force, and nothing of another proxy is left.
    pub fn cleared(&mut self) {
        self.is_cleared = true;
    }
}

/// A decision with the sign that others look out for.
#[derive(Debug)]
pub struct Rivals {
    decision: Decision,
    /// Whether another proxy answers `/proxyMode`: kept true by whoever asks.
    proxy_mode: Arc<AtomicBool>,
}

impl Rivals {
    /// See [`Decision::new`].
    pub fn new(patience: Duration, proxy_mode: Arc<AtomicBool>) -> Self {
        Self {
            decision: Decision::new(patience),
            proxy_mode,
        }
    }

    /// Looks now; `found` is what the tables were found to hold.
    pub(super) fn look(&mut self, found: Found) -> Stance {
        let Found { canary, rules } = found;
        let seen = Seen {
            proxy_mode: self.proxy_mode.load(Ordering::Relaxed),
            // Without nftables in the kernel there is no such table.
            nft_table: nft::serving().is_ok_and(|families| families > 0),
            canary,
            rules,
        };
        self.decision.look(Instant::now(), seen)
    }

    /// The decision.
    pub fn decision(&mut self) -> &mut Decision {
        &mut self.decision
    }
}

/// What of another proxy the tables were found to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// [`Sign::Canary`].
    pub canary: bool,
    /// [`Sign::Rules`].
    pub rules: bool,
}

impl Found {
    /// Takes in a line of `iptables-save`. Only kube-proxy says to which address a rule of a Service leads.
    pub(super) fn add(&mut self, line: &str) {
        self.canary |= line
            .strip_prefix(':')
            .and_then(|declared| declared.strip_prefix(CANARY))
            .is_some_and(|rest| rest.starts_with(' '));
        self.rules |= line.starts_with("-A KUBE-SV") && line.contains(" -> ");
    }
}

#[cfg(test)]
mod tests;
