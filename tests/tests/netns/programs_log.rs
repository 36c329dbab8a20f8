//! `--log-programs`: each decision of the programs is a line of the agent's log.

use proxy_tests::scenario::{TCP, UDP, each_family_with, reaches, refuses};

#[test]
#[ignore = "needs root and eBPF"]
fn the_programs_say_what_they_do_if_asked() {
    each_family_with("log", &["--log-programs"], |s| {
        let web = s.service("web", 1).endpoint(s.endpoint(&s.near));
        s.manifests.put(&s.service("empty", 2))?;
        s.apply(&web)?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        refuses(&s.client.peer()?, s.vip(2), TCP, UDP)?;
        s.agent.wait_log(&format!("{}]:{TCP} goes to", s.vip(1)))?;
        s.agent.wait_log(&format!("{}]:{TCP} is refused", s.vip(2)))
    });
}
