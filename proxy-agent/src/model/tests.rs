use std::num::NonZeroU16;

use super::*;
use crate::state::{Family, Protocol};

fn name(short: &str) -> ServiceName {
    ServiceName::new("default", short)
}

fn slice(service: &str, last: u8) -> Arc<Slice> {
    let port = EndpointPort::new("", Protocol::Tcp, NonZeroU16::MIN);
    let endpoint = Endpoint::ready([10, 0, 0, last].into());
    Arc::new(Slice::new(
        name(service),
        Family::V4,
        vec![port],
        vec![endpoint],
    ))
}

fn slices(changes: Vec<(&str, Option<Arc<Slice>>)>) -> Update {
    let slices = changes
        .into_iter()
        .map(|(short, slice)| (SliceName::new("default", short), slice));
    Update::Objects(Objects {
        slices: slices.collect(),
        ..Objects::default()
    })
}

fn dirty(names: &[&str]) -> Dirty {
    Dirty {
        services: names.iter().map(|short| name(short)).collect(),
        ..Dirty::default()
    }
}

#[test]
fn slices_are_kept_by_service_and_name() {
    let mut model = Model::new(NodeName::new("node-a"));
    let three =
        [("b", 2), ("a", 1), ("c", 3)].map(|(short, last)| (short, Some(slice("web", last))));
    assert_eq!(model.apply(slices(three.to_vec())), dirty(&["web"]));
    let firsts = model
        .slices(&name("web"))
        .map(|slice| slice.endpoints[0].address.to_string());
    assert_eq!(
        firsts.collect::<Vec<_>>(),
        ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    );
    assert_eq!(model.apply(slices(vec![("b", None)])), dirty(&["web"]));
    assert_eq!(model.apply(slices(vec![("b", None)])), dirty(&[]));
    assert_eq!(model.slices(&name("web")).count(), 2);
}

#[test]
fn a_slice_given_to_another_service_touches_both() {
    let mut model = Model::new(NodeName::new("node-a"));
    model.apply(slices(vec![("a", Some(slice("old", 1)))]));
    assert_eq!(
        model.apply(slices(vec![("a", Some(slice("new", 1)))])),
        dirty(&["new", "old"])
    );
    assert_eq!(model.slices(&name("old")).count(), 0);
    assert_eq!(model.slices(&name("new")).count(), 1);
}

#[test]
fn a_model_is_complete_when_every_source_has_delivered_everything() {
    let mut model = Model::new(NodeName::new("node-a"));
    let objects = |complete| {
        Update::Objects(Objects {
            complete,
            ..Objects::default()
        })
    };
    model.apply(objects(false));
    assert!(!model.is_synced());
    assert!(
        model.apply(Update::Addresses(BTreeSet::new())).addresses,
        "the first addresses are news, even none"
    );
    assert!(model.is_synced() && !model.is_complete());
    model.apply(objects(true));
    assert!(model.is_complete());
}
