//! Flows that began while no rule translated them: the kernel goes on with a flow as it began.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Peer, Scenario,
    peer::Socket,
    scenario::{SOON, TCP, UDP, each_family_with, in_mode},
    wait_for,
};

const MODE: [&str; 6] = in_mode("iptables");
/// For an answer that does not come.
const SHORT: Duration = Duration::from_millis(500);

/// A client that uses the same port for all it sends to a Service, in either protocol.
struct Client {
    peer: Peer,
    from: SocketAddr,
    vip: IpAddr,
    udp: Socket,
}

impl Client {
    fn new(s: &Scenario, port: u16, vip: IpAddr) -> anyhow::Result<Self> {
        let peer = s.client.peer()?;
        let from = SocketAddr::new(s.client.address(s.v6), port);
        let udp = peer.open_udp(from)?;
        Ok(Self {
            peer,
            from,
            vip,
            udp,
        })
    }

    fn ask(&self) -> anyhow::Result<()> {
        let to = (self.vip, UDP).into();
        self.udp.send_to("?", to)?;
        self.udp.receive(SHORT).context("UDP")?;
        let to = (self.vip, TCP).into();
        let tcp = self.peer.connect_tcp_from(to, Some(self.from), SHORT);
        tcp.context("TCP")?.receive(SHORT)?;
        Ok(())
    }

    fn is_not_served(&self) -> anyhow::Result<()> {
        let vip = self.vip;
        let (udp, tcp) = ((vip, UDP).into(), (vip, TCP).into());
        self.udp.send_to("?", udp)?;
        let tcp = self.peer.connect_tcp_from(tcp, Some(self.from), SHORT);
        ensure!(tcp.is_err(), "{vip} is served");
        ensure!(self.udp.receive(SHORT).is_err(), "{vip} is served");
        Ok(())
    }

    fn wait_served(&self) -> anyhow::Result<()> {
        wait_for("the client is served", SOON, || self.ask())
    }
}

/// What nobody translates is lost, as on most networks.
fn lose_the_untranslated(s: &Scenario) -> anyhow::Result<()> {
    let [network, gateway] = match s.v6 {
        true => ["fd00:10:96::/112".to_owned(), s.b.v6().to_string()],
        false => ["10.96.0.0/12".to_owned(), s.b.v4().to_string()],
    };
    s.a.ip(&format!("route add {network} via {gateway}\n"))?;
    s.b.ip(&format!("route add blackhole {network}\n"))
}

#[test]
#[ignore = "needs root"]
fn flows_that_began_without_rules_are_served_once_these_are_there() {
    each_family_with("untranslated", &MODE, |s| {
        lose_the_untranslated(s)?;
        let [web, new] = [("web", 1), ("new", 2)]
            .map(|(name, number)| s.service(name, number).endpoint(s.endpoint(&s.near)));
        let to = SocketAddr::from((s.vip(1), TCP));
        s.manifests.put(&web)?;
        Client::new(s, 20_000, s.vip(1))?.wait_served()?;
        let established = s.client.peer()?.connect_tcp(to)?;
        established.receive(SHORT)?;

        // Between two agents.
        let client = Client::new(s, 20_001, s.vip(1))?;
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        let waits = Peer::start(s.client.place())?;
        let waits = thread::spawn(move || waits.connect_tcp_from(to, None, SOON).map(drop));
        client.is_not_served()?;
        s.agent.spawn()?;
        client.wait_served()?;
        let waited = waits.join().expect("the thread does not panic");
        waited.context("a connection that was tried all the time")?;

        // Somebody removes the rules, and the agent is slow to put them back.
        let client = Client::new(s, 20_002, s.vip(1))?;
        let agent = Pid::from_raw(s.agent.pid()?.try_into()?);
        kill(agent, Signal::SIGSTOP)?;
        let tool = ["iptables", "ip6tables"][usize::from(s.v6)];
        s.a.output(tool, &["-t", "nat", "-F"])?;
        let unserved = client.is_not_served();
        kill(agent, Signal::SIGCONT)?;
        unserved?;
        client.wait_served()?;

        // Before the agent knows the Service.
        let client = Client::new(s, 20_003, s.vip(2))?;
        client.is_not_served()?;
        s.manifests.put(&new)?;
        client.wait_served()?;

        established.ask().context("the established connection")?;
        Ok(())
    });
}
