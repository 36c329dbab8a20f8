//! How a test knows that an agent has read what was written before.

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::ensure;
use serde_json::Value;

use crate::{Agent, Manifests, Service, scenario::SOON, wait_for};

/// What [`Marker`] is called.
pub(crate) const MARKER: &str = "default/marker:marker";

/// A Service with another port each time, by which an agent is seen to have read what was written before it.
#[derive(Debug, Default)]
pub struct Marker(Cell<u16>);

impl Marker {
    /// Waits until the kernel holds everything that the files said when this was called.
    ///
    /// # Errors
    /// It did not get there.
    pub fn settle(&self, agent: &Agent, manifests: &Manifests) -> anyhow::Result<()> {
        // A change is applied before a later one, deletions last: when the second marker is there, the sync with the
        // first one is over.
        for _ in 0..2 {
            let port = self.put(manifests, Ipv4Addr::new(10, 96, 255, 254).into())?;
            wait_for("the change arrives in the kernel", SOON, || {
                let services = agent.json(&["dump", "services"])?;
                let found = find(&services, MARKER)
                    .is_some_and(|service| service["frontends"][0]["port"] == port);
                ensure!(found, "{services}\n{}", agent.log());
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Writes it with its next port, which is told.
    pub(crate) fn put(&self, manifests: &Manifests, vip: IpAddr) -> anyhow::Result<u16> {
        let port = self.0.get() + 1;
        self.0.set(port);
        manifests.put(&Service::new("marker", &[vip]).port("marker", "TCP", port, port))?;
        Ok(port)
    }
}

/// One element of `dump services`, by its "namespace/name:port".
pub(crate) fn find<'a>(services: &'a Value, name: &str) -> Option<&'a Value> {
    services
        .as_array()?
        .iter()
        .find(|service| service["service"] == name)
}
