use super::*;

const PATIENCE: Duration = Duration::from_secs(45);
const NOTHING: Seen = Seen {
    proxy_mode: false,
    nft_table: false,
    canary: false,
    rules: false,
};
const SPEAKS: Seen = Seen {
    proxy_mode: true,
    ..NOTHING
};
const LEFT: Seen = Seen {
    nft_table: true,
    canary: true,
    rules: true,
    ..NOTHING
};

struct Clock {
    decision: Decision,
    start: Instant,
}

impl Clock {
    fn new() -> Self {
        Self {
            decision: Decision::new(PATIENCE),
            start: Instant::now(),
        }
    }

    fn look(&mut self, second: u64, seen: Seen) -> Stance {
        self.decision
            .look(self.start + Duration::from_secs(second), seen)
    }
}

#[test]
fn what_a_former_proxy_left_is_no_sign_until_we_removed_it() {
    let mut clock = Clock::new();
    assert_eq!(clock.look(0, LEFT), Stance::Serve);
    assert!(clock.decision.wants_clearing());
    clock.decision.cleared();
    assert!(!clock.decision.wants_clearing());
    assert_eq!(clock.look(1, NOTHING), Stance::Serve);
    for (seen, sign) in [
        (LEFT, Sign::NftTable),
        (
            Seen {
                canary: true,
                ..NOTHING
            },
            Sign::Canary,
        ),
        (
            Seen {
                rules: true,
                ..NOTHING
            },
            Sign::Rules,
        ),
    ] {
        let mut clock = Clock::new();
        clock.decision.cleared();
        assert_eq!(clock.look(1, seen), Stance::Observe(sign));
    }
}

#[test]
fn a_proxy_that_answers_is_observed_until_it_has_been_silent_for_a_while() {
    let mut clock = Clock::new();
    let observing = Stance::Observe(Sign::ProxyMode);
    assert_eq!(clock.look(0, SPEAKS), observing);
    assert_eq!(clock.look(100, SPEAKS), observing);
    assert_eq!(clock.look(144, LEFT), observing);
    assert_eq!(clock.look(145, LEFT), Stance::Serve);
    // It left that; only when we removed it, it counts.
    assert_eq!(clock.look(146, LEFT), Stance::Serve);
}

#[test]
fn one_that_comes_back_again_and_again_gets_twice_the_time_each_time() {
    let mut clock = Clock::new();
    let mut now = 0;
    for expected in [45, 90, 180, 360, 720, 1440, 2880, 3600, 3600] {
        clock.decision.cleared();
        assert_eq!(clock.look(now, LEFT), Stance::Observe(Sign::NftTable));
        assert_ne!(clock.look(now + expected - 1, LEFT), Stance::Serve);
        now += expected;
        assert_eq!(clock.look(now, LEFT), Stance::Serve, "after {expected} s");
        now += 20;
    }
    // Having served for ten minutes, everything begins anew.
    now += 600;
    clock.decision.cleared();
    clock.look(now, LEFT);
    assert_eq!(clock.look(now + 45, LEFT), Stance::Serve);
}

#[test]
fn only_what_no_agent_writes_is_found() {
    let found = |text: &str| {
        let mut found = Found::default();
        text.lines().for_each(|line| found.add(line));
        found
    };
    let ours = ":KUBE-SERVICES - [0:0]\n:KUBE-PROXY-CANARY-OF-MINE - [0:0]\n\
        -A KUBE-SVC-X -m comment --comment \"default/web:http cluster IP\" -j KUBE-MARK-MASQ\n\
        -A MINE -m comment --comment \"a -> b\" -j DROP\n";
    assert_eq!(found(ours), Found::default());
    let canary = found(":KUBE-PROXY-CANARY - [0:0]\n");
    assert!(canary.canary && !canary.rules);
    let rules = found(
        "-A KUBE-SVC-X -m comment --comment \"default/web:http -> 10.244.1.2:8080\" -j KUBE-SEP-Y\n",
    );
    assert!(rules.rules && !rules.canary);
}
