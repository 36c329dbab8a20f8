//! The networks that ClusterIPs are taken from.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::api::networking::v1;

use super::{
    problem::{Blame, Kind, Problem},
    text,
};

/// A ServiceCIDR's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceCidrName(Arc<str>);

impl fmt::Display for ServiceCidrName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a ServiceCIDR says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its networks, of either family.
    pub networks: Box<[IpNet]>,
}

impl ServiceCidr {
    /// The name of `object`.
    ///
    /// # Errors
    /// It is no possible name.
    pub fn name(object: &v1::ServiceCIDR) -> Result<ServiceCidrName, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let blame = Blame::new(Kind::ServiceCidr, None, name);
        text::subdomain(name).map_err(|what| blame.refuse("metadata.name", what))?;
        Ok(ServiceCidrName(name.into()))
    }

    /// Reads a ServiceCIDR, and says which networks it leaves out. One that is being deleted counts until it is gone: its
    /// Services keep it.
    ///
    /// # Errors
    /// It has no possible name.
    pub fn parse(object: &v1::ServiceCIDR) -> Result<(Self, Vec<Problem>), Problem> {
        let name = Self::name(object)?;
        let blame = Blame::new(Kind::ServiceCidr, None, &name.0);
        let spec = object.spec.as_ref();
        let listed = spec.and_then(|spec| spec.cidrs.as_deref());
        let (mut networks, mut left_out) = (Vec::new(), Vec::new());
        for (index, text) in listed.unwrap_or_default().iter().enumerate() {
            match network(text) {
                Ok(network) => networks.push(network),
                Err(what) => left_out.push(blame.trim(format!("spec.cidrs[{index}]"), what)),
            }
        }
        let networks = networks.into();
        Ok((Self { networks }, left_out))
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    let network = text::prefix(text)?;
    match network.prefix_len() {
        // What no Service has is dropped there: that would be nearly everything.
        0 => Err(format!(
            "{network} is every address, and not only Services'"
        )),
        _ => Ok(network),
    }
}

/// All that are known.
#[derive(Clone, Debug, Default)]
pub(super) struct ServiceCidrs(BTreeMap<ServiceCidrName, Arc<ServiceCidr>>);

impl ServiceCidrs {
    /// Takes in changes; says whether the networks of all are others now.
    pub(super) fn apply(
        &mut self,
        changes: Vec<(ServiceCidrName, Option<Arc<ServiceCidr>>)>,
    ) -> bool {
        if changes.is_empty() {
            return false;
        }
        let before = self.networks();
        for (name, cidr) in changes {
            match cidr {
                Some(cidr) => self.0.insert(name, cidr),
                None => self.0.remove(&name),
            };
        }
        self.networks() != before
    }

    /// The networks of all: several may name the same one.
    pub(super) fn networks(&self) -> BTreeSet<IpNet> {
        let cidrs = self.0.values();
        cidrs
            .flat_map(|cidr| cidr.networks.iter().copied())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(cidrs: &[&str]) -> (Vec<String>, Vec<String>) {
        let object = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
        let object = serde_json::from_value(object).unwrap();
        let (cidr, left_out) = ServiceCidr::parse(&object).unwrap();
        let networks = cidr.networks.iter().map(ToString::to_string);
        let left_out = left_out.iter().map(ToString::to_string);
        (networks.collect(), left_out.collect())
    }

    #[test]
    fn networks_of_both_families_are_read() {
        let (networks, left_out) = parsed(&["10.96.0.1/16", "fd00:10:96::/112"]);
        assert_eq!(networks, ["10.96.0.0/16", "fd00:10:96::/112"]);
        assert!(left_out.is_empty(), "{left_out:?}");
        assert_eq!(parsed(&[]), (Vec::new(), Vec::new()));
    }

    #[test]
    fn what_is_no_network_of_services_is_named_and_left_out() {
        let (networks, left_out) = parsed(&["10.96.0.0", "0.0.0.0/0", "10.97.0.0/16", "::/0"]);
        assert_eq!(networks, ["10.97.0.0/16"]);
        let every = "is every address, and not only Services'; left out, the rest is used";
        assert_eq!(
            left_out,
            [
                "ServiceCIDR kubernetes: spec.cidrs[0]: \"10.96.0.0\" is not a CIDR; left out, the rest is used".to_owned(),
                format!("ServiceCIDR kubernetes: spec.cidrs[1]: 0.0.0.0/0 {every}"),
                format!("ServiceCIDR kubernetes: spec.cidrs[3]: ::/0 {every}"),
            ]
        );
    }

    #[test]
    fn one_without_a_name_is_refused() {
        let object = serde_json::from_value(json!({"spec": {"cidrs": ["10.96.0.0/16"]}}));
        assert!(ServiceCidr::parse(&object.unwrap()).is_err());
    }

    #[test]
    fn a_network_counts_as_long_as_one_of_them_names_it() {
        let mut known = ServiceCidrs::default();
        let mut apply = |name: &str, cidrs: Option<&[&str]>| {
            let cidr = cidrs.map(|cidrs| {
                let networks = cidrs.iter().map(|cidr| cidr.parse().unwrap());
                Arc::new(ServiceCidr {
                    networks: networks.collect(),
                })
            });
            let is_news = known.apply(vec![(ServiceCidrName(name.into()), cidr)]);
            (is_news, known.networks().len())
        };
        assert_eq!(apply("kubernetes", Some(&["10.96.0.0/16"])), (true, 1));
        let both = ["10.96.0.0/16", "10.97.0.0/16"];
        assert_eq!(apply("more", Some(&both)), (true, 2));
        assert_eq!(apply("kubernetes", None), (false, 2));
        assert_eq!(apply("kubernetes", None), (false, 2));
        assert_eq!(apply("more", Some(&both[1..])), (true, 1));
        assert_eq!(apply("more", None), (true, 0));
    }
}
