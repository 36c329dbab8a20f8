//! What load balancers ask for at `healthCheckNodePort`.

use std::net::{SocketAddr, TcpListener};

use anyhow::ensure;
use proxy_tests::{
    Pod, Scenario, Service,
    bystander::Bystanders,
    place::Place,
    scenario::{SOON, in_family},
    wait_for,
};

const PORT: u16 = 32_000;
const TAKEN: u16 = 32_001;
const MODES: [&[&str]; 2] = [&[], &["--mode", "iptables"]];

/// Asks from outside, where a firewall drops what nobody accepts.
fn asks(outsider: &Pod, to: SocketAddr, status: u16, endpoints: usize) -> anyhow::Result<()> {
    wait_for(&format!("{status} from {to}"), SOON, || {
        let (found, body) = outsider.place().http_get(to, "/healthz")?;
        let counted = body.contains(&format!("\"localEndpoints\": {endpoints},"));
        ensure!(found == status && counted, "{found} {body}");
        Ok(())
    })
}

fn web(s: &Scenario, name: &str, number: u8, port: u16) -> Service {
    s.service(name, number)
        .load_balancer(s.outside(number), "VIP")
        .spec("externalTrafficPolicy", "Local")
        .spec("healthCheckNodePort", port)
}

/// Nothing reaches the node's own sockets unless a rule accepts it; what belongs to its own connections does.
fn close_the_firewall(place: &Place) -> anyhow::Result<()> {
    for tool in ["iptables", "ip6tables"] {
        for rule in [
            "-A INPUT -i lo -j ACCEPT",
            "-A INPUT -p ipv6-icmp -j ACCEPT",
            "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
            "-P INPUT DROP",
        ] {
            let mut command = place.command(tool)?;
            let status = command.args(rule.split(' ')).status()?;
            ensure!(status.success(), "{tool} {rule}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root and eBPF"]
fn load_balancers_outside_are_told_of_endpoints_in_both_families() {
    for (v6, args) in [(false, MODES[0]), (true, MODES[1])] {
        in_family("health-checks", v6, args, |s| {
            let outsider = s.topology.outsider()?;
            close_the_firewall(s.a.place())?;
            // The Service has one family, the node two.
            let [v4, v6] = [s.a.v4().into(), s.a.v6().into()].map(|ip| SocketAddr::new(ip, PORT));
            let none_here = web(s, "web", 1, PORT).endpoint(s.endpoint(&s.far));
            s.manifests.put(&none_here)?;
            for to in [v4, v6] {
                asks(&outsider, to, 503, 0)?;
            }
            let here = none_here.endpoint(s.endpoint(&s.near));
            s.manifests.put(&here)?;
            for to in [v4, v6] {
                asks(&outsider, to, 200, 1)?;
            }
            s.manifests.remove("web")?;
            wait_for("nobody listens any more", SOON, || {
                ensure!(s.a.place().http_get(v4, "/").is_err());
                Ok(())
            })
        });
    }
}

#[test]
#[ignore = "needs root and eBPF"]
fn a_taken_health_check_port_is_told_and_the_others_answer() {
    for (v6, args) in [(true, MODES[0]), (false, MODES[1])] {
        in_family("health-taken", v6, args, |s| {
            let bystanders = Bystanders::start(s)?;
            let outsider = bystanders.outsider();
            let taken = SocketAddr::from((s.unspecified(), TAKEN));
            let thief = s.a.place().inside(|| TcpListener::bind(taken))??;
            let endpoint = s.endpoint(&s.near);
            let failed = "proxy_agent_health_check_ports_failed";
            s.manifests
                .put(&web(s, "unlucky", 1, TAKEN).endpoint(endpoint.clone()))?;
            s.agent.wait_metric(failed, "", |failed| failed == 1.0)?;
            s.agent.wait_log("default/unlucky")?;
            s.manifests
                .put(&web(s, "web", 2, PORT).endpoint(endpoint))?;
            let node = s.a.address(s.v6);
            asks(outsider, (node, PORT).into(), 200, 1)?;
            drop(thief);
            // Tried again without being told.
            asks(outsider, (node, TAKEN).into(), 200, 1)?;
            s.agent.wait_metric(failed, "", |failed| failed == 0.0)?;
            bystanders.ensure_served()
        });
    }
}
