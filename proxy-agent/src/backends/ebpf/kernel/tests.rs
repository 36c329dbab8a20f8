//! The life of a generation, on the real kernel: in a directory and a cgroup of the test's own, where no traffic flows.

use std::{fs, time::Duration};

use proxy_ebpf::{
    abi::{
        ABI_VERSION, Addr, Be16, FrontendKey, FrontendValue, Member, MemberWord, Policy, Service,
        SetWord, Slot, TCP, kind, meta_flags,
    },
    lb::Scope,
};

use super::{
    super::{
        links::{Hook, Place},
        maps::Array,
        store::Capacity,
        store::Store,
        sys::MapSpec,
        view::{MapSummary, PinnedMaps},
    },
    build::{Recipe, Share},
    *,
};

/// A directory on the bpffs and a cgroup, both gone at the end.
struct Node {
    bpf_dir: PathBuf,
    cgroup: PathBuf,
}

impl Node {
    fn new() -> Self {
        let thread = std::thread::current();
        let test = thread
            .name()
            .and_then(|name| name.rsplit("::").next())
            .unwrap_or("main");
        let name = format!("proxy-agent-test-{}-{test}", std::process::id());
        let cgroup = probe::cgroup_root().unwrap().join(&name);
        fs::create_dir(&cgroup).unwrap();
        Self {
            bpf_dir: PathBuf::from("/sys/fs/bpf").join(name),
            cgroup,
        }
    }

    fn open(&self) -> Result<KernelStore, Error> {
        KernelStore::open(self.options())
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            bpf_dir: self.bpf_dir.clone(),
            cgroup: Some(self.cgroup.clone()),
            node_name: "n1".to_owned(),
            lease: Lease::Never,
            host_only: false,
            log: false,
        }
    }

    fn view(&self) -> PinnedMaps {
        PinnedMaps::open(&self.bpf_dir).unwrap()
    }

    /// An agent that has published one frontend with one backend.
    fn published(&self) -> KernelStore {
        let mut store = self.open().unwrap();
        store.reserve(&Capacity::default()).unwrap();
        fill(&mut store);
        store.publish().unwrap();
        store
    }

    fn links(&self) -> Vec<(u32, u32)> {
        self.view()
            .pins
            .hooks()
            .unwrap()
            .iter()
            .map(|hook| (hook.link, hook.program))
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.bpf_dir);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn key(port: u16) -> FrontendKey {
    FrontendKey::new(Addr::from_v4_word(0x0100_600a), Be16::new(port), TCP)
}

fn fill(store: &mut KernelStore) {
    store.write_slots(
        7,
        &[Slot {
            member: 3,
            generation: 5,
            ..Slot::default()
        }],
    );
    let member = Member {
        word: MemberWord::new(9, MemberWord::SERVING),
        ..Member::default()
    };
    store.write_member(3, &member);
    store.write_service(
        2,
        &Service {
            used: 1,
            ..Service::default()
        },
    );
    store.commit_set(2, Scope::Cluster, SetWord::new(7, 1, 5));
    store.commit_policy(2, Policy::new(0, 60));
    store
        .upsert_frontends(&[(
            key(80),
            FrontendValue::new(&key(80), 2, kind::CLUSTER_IP, 0),
        )])
        .unwrap();
}

/// Ends the agent, and unpins one of its maps: where that was.
fn lose(store: KernelStore, map: &str) -> PathBuf {
    let generation = store.current.as_ref().unwrap().generation.clone();
    drop(store);
    let pin = generation.pin_path(map);
    fs::remove_file(&pin).unwrap();
    pin
}

/// Names of the maps, sorted, that are not the same objects any more. Constants aside, which come with the programs.
fn replaced<'a>(before: &[MapSummary], after: &'a [MapSummary]) -> Vec<&'a str> {
    let is_another = |map: &&MapSummary| {
        let old = before.iter().find(|old| old.name == map.name);
        !map.name.starts_with("rodata") && old.unwrap().id != map.id
    };
    let another = after.iter().filter(is_another);
    another.map(|map| map.name.as_str()).collect()
}

/// Asserts that every link is still there and runs another program.
fn assert_moved(before: &[(u32, u32)], after: &[(u32, u32)]) {
    assert_eq!(before.len(), after.len());
    let mut pairs = before.iter().zip(after);
    let moved = pairs.all(|(old, new)| old.0 == new.0 && old.1 != new.1);
    assert!(moved, "{before:?} {after:?}");
}

/// The object with a program that the verifier refuses.
fn spoiled(store: &KernelStore, hook: Hook) -> Object {
    let mut object = Object::embedded(store.constants).unwrap();
    object.spoil(hook);
    object
}

fn assert_filled(store: &KernelStore) {
    let service = store.service(2);
    assert_eq!((service.cluster, service.used), (SetWord::new(7, 1, 5), 1));
    assert_eq!(service.policy.affinity_seconds(), 60);
    assert_eq!((store.slot(7).member, store.slot(7).generation), (3, 5));
    assert_eq!(
        store.member(3).word,
        MemberWord::new(9, MemberWord::SERVING)
    );
    let frontends = store.frontends().unwrap();
    assert_eq!(
        frontends,
        [(
            key(80),
            FrontendValue::new(&key(80), 2, kind::CLUSTER_IP, 0)
        )]
    );
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_fresh_node_gets_small_maps_and_every_hook() {
    let node = Node::new();
    let store = node.published();
    assert_eq!(store.left_out(), []);
    assert_eq!((store.generation(), store.capacity().services), (1, 1024));
    let hooks = node.view().pins.hooks().unwrap();
    assert_eq!(hooks.len(), Hook::ALL.len(), "{hooks:#?}");
    assert!(
        hooks
            .iter()
            .all(|hook| hook.cgroup == 0 || hook.cgroup == store.cgroup.id())
    );
    assert_eq!(node.view().frontends().unwrap().len(), 1);
    assert_eq!(node.view().pins.sockets().unwrap(), []);
    let maps = node.view().pins.maps().unwrap();
    let frontends = maps.iter().find(|map| map.name == "FRONTENDS").unwrap();
    assert_eq!(
        (frontends.map_type, frontends.entries, frontends.capacity),
        ("hash", Some(1), 4096)
    );
    assert!(frontends.bytes > 0, "{maps:#?}");
}

#[test]
#[ignore = "needs CAP_BPF"]
fn entries_in_use_are_counted_to_the_end_of_a_map() {
    let node = Node::new();
    let mut store = node.published();
    let used = |name: &str| {
        let maps = node.view().pins.maps().unwrap();
        let map = maps.into_iter().find(|map| map.name == name).unwrap();
        (map.entries.unwrap(), map.capacity)
    };
    let (before, capacity) = used("SLOTS");
    let slot = store.slot(7);
    assert_ne!(slot, Slot::default());
    for index in [8_191, 8_192, capacity - 1] {
        store.write_slots(index, &[slot]);
    }
    assert_eq!(used("SLOTS"), (before + 3, capacity));
    let (before, capacity) = used("MEMBERS");
    let member = Member {
        word: MemberWord::new(1, MemberWord::SERVING),
        ..Member::default()
    };
    store.write_member(capacity - 1, &member);
    assert_eq!(used("MEMBERS"), (before + 1, capacity));
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_restart_adopts_maps_and_links_and_writes_nothing() {
    let node = Node::new();
    drop(node.published());
    let before = (
        node.links(),
        node.view().pins.maps().unwrap(),
        node.view().meta(),
    );
    let mut store = node.open().unwrap();
    assert_filled(&store);
    store.publish().unwrap();
    assert_eq!(
        (
            node.links(),
            node.view().pins.maps().unwrap(),
            node.view().meta()
        ),
        before
    );
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_second_agent_is_refused_and_told_which_directory() {
    let node = Node::new();
    let store = node.published();
    let error = node.open().err().unwrap().to_string();
    assert!(
        error.contains("another agent has") && error.contains("--bpf-dir"),
        "{error}"
    );
    assert!(error.contains(node.bpf_dir.to_str().unwrap()), "{error}");
    drop(store);
    node.open().unwrap();
}

#[test]
#[ignore = "needs CAP_BPF"]
fn growth_keeps_entries_and_links_and_carries_what_programs_write() {
    let node = Node::new();
    let mut store = node.published();
    store.tables().stats.add(2, 0, 41);
    let before = node.view().pins.maps().unwrap();
    let links = node.links();
    for swap in 0..20_u32 {
        let need = Capacity {
            slots: 65_537 << swap.min(2),
            frontends: 4_097 + swap,
            ..store.capacity()
        };
        store.reserve(&need).unwrap();
        assert_filled(&store);
        assert!(shapes::holds(&store.capacity(), &need));
    }
    let after = node.view().pins.maps().unwrap();
    assert_eq!(replaced(&before, &after), ["FRONTENDS", "META", "SLOTS"]);
    assert_moved(&links, &node.links());
    assert_eq!(store.stats(2).connections, 41);
    assert_eq!(store.dir.generations().unwrap().len(), 1);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn counters_survive_a_growth_of_services() {
    let node = Node::new();
    let mut store = node.published();
    store.tables().stats.add(2, 8, 17);
    store
        .reserve(&Capacity {
            services: 5_000,
            ..store.capacity()
        })
        .unwrap();
    assert_eq!(
        (store.stats(2).datagrams, store.capacity().services),
        (17, 5_000)
    );
    assert_filled(&store);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_foreign_map_is_left_alone_and_a_generation_is_made_beside_it() {
    let node = Node::new();
    let store = node.published();
    let pin = lose(store, "FRONTENDS");
    let foreign = MapSpec {
        name: "theirs".to_owned(),
        map_type: 1,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        ..MapSpec::default()
    };
    let foreign = super::super::sys::map_create(&foreign, None, None).unwrap();
    super::super::sys::obj_pin(&foreign, &pin).unwrap();

    let mut store = node.open().unwrap();
    assert_eq!(store.generation(), 2);
    assert_eq!(store.frontends().unwrap(), [], "lost with the pin");
    assert_eq!(
        store.service(2).cluster,
        SetWord::new(7, 1, 5),
        "ids are carried"
    );
    fill(&mut store);
    store.publish().unwrap();
    assert!(pin.exists(), "the foreign map stays");
    assert_eq!(node.view().frontends().unwrap().len(), 1);
    drop(store);
    assert_eq!(
        node.open().unwrap().generation(),
        2,
        "adopted, whatever lies beside it"
    );
}

#[test]
#[ignore = "needs CAP_BPF"]
fn lost_indices_start_with_generations_that_no_socket_knows() {
    let node = Node::new();
    lose(node.published(), "MEMBERS");
    let store = node.open().unwrap();
    assert_eq!(store.service(2), Service::default());
    assert!(store.member(3).word.generation() > 9 && store.member(3).word.bits() == 0);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn an_unfinished_generation_is_removed() {
    let node = Node::new();
    let mut store = node.open().unwrap();
    store.reserve(&Capacity::default()).unwrap();
    assert!(
        PinnedMaps::open(&node.bpf_dir).is_err(),
        "nothing complete to show"
    );
    drop(store);
    let store = node.open().unwrap();
    assert_eq!(
        (store.generation(), store.capacity()),
        (0, Capacity::default())
    );
    assert_eq!(store.dir.generations().unwrap(), []);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_swap_that_was_cut_short_is_completed_at_the_next_start() {
    let node = Node::new();
    let mut store = node.published();
    let object = Object::embedded(store.constants).unwrap();
    let old = store.current.take().unwrap();
    let recipe = Recipe {
        old: &old.fds,
        share: Share::WhatFits,
        keep_ids: true,
        need: Capacity {
            members: 9_000,
            ..Capacity::default()
        },
    };
    let (generation, fds) = build::build(&store.dir, &object, 2, &recipe).unwrap();
    let current = Current::new(generation, fds, false, None).unwrap();
    store.complete(&current);
    let links = node.links();
    drop(store);

    let store = node.open().unwrap();
    assert_eq!(store.generation(), 2);
    assert_filled(&store);
    assert_moved(&links, &node.links());
}

#[test]
#[ignore = "needs CAP_BPF"]
fn batches_insert_replace_and_delete_across_chunks() {
    let node = Node::new();
    let mut store = node.open().unwrap();
    store
        .reserve(&Capacity {
            frontends: 20_000,
            ..Capacity::default()
        })
        .unwrap();
    let entry = |port: u16| {
        (
            key(port),
            FrontendValue::new(&key(port), u32::from(port), 1, 0),
        )
    };
    let entries: Vec<_> = (1..=20_000).map(entry).collect();
    store.upsert_frontends(&entries).unwrap();
    let mut read = store.frontends().unwrap();
    read.sort_unstable_by_key(|(key, _)| key.port.host());
    assert_eq!(read, entries);
    let odd: Vec<_> = (1..=20_000).step_by(2).map(key).collect();
    store.delete_frontends(&odd).unwrap();
    assert_eq!(store.frontends().unwrap().len(), 10_000);
    // Missing keys, the odd ones, are no error.
    let all: Vec<_> = (1..=20_000).map(key).collect();
    store.delete_frontends(&all).unwrap();
    assert_eq!(store.frontends().unwrap(), []);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_grace_period_takes_a_second_and_does_not_block() {
    let node = Node::new();
    let mut store = node.open().unwrap();
    let start = std::time::Instant::now();
    let first = store.start_grace();
    let second = store.start_grace();
    assert!(start.elapsed() < Duration::from_millis(100) && store.grace_over() < first);
    store.wait_grace(second);
    assert!(start.elapsed() >= Duration::from_secs(1) && start.elapsed() < Duration::from_secs(3));
    assert_eq!(store.grace_over(), second);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn the_lease_is_in_force_at_once_and_a_restart_finds_it() {
    let node = Node::new();
    let lease = || node.view().meta().lease_ns;
    let open = |lease, host_only| {
        let mut store = KernelStore::open(OpenOptions {
            lease,
            host_only,
            ..node.options()
        })
        .unwrap();
        store.publish().unwrap();
        store
    };
    let mut store = open(Lease::AsFound, false);
    assert_eq!(lease(), 0);
    store.set_lease(Lease::After(Duration::from_secs(30)));
    assert_eq!(lease(), 30_000_000_000);
    drop(store);
    drop(open(Lease::AsFound, true));
    assert_eq!(lease(), 30_000_000_000);
    let is_host_only = || node.view().meta().flags & meta_flags::HOST_ONLY != 0;
    assert!(is_host_only());
    let mut store = open(Lease::AsFound, false);
    assert!(!is_host_only());
    store.set_lease(Lease::Never);
    assert_eq!(lease(), 0);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn excluded_cgroups_are_told_to_the_programs() {
    let node = Node::new();
    let mut store = node.published();
    store.set_opt_out(&BTreeSet::from([7, 9])).unwrap();
    let flag = || node.view().meta().flags & meta_flags::OPT_OUT;
    assert_eq!(flag(), meta_flags::OPT_OUT);
    store.set_opt_out(&BTreeSet::from([9])).unwrap();
    assert_eq!(node.view().pins.opt_out().unwrap(), BTreeSet::from([9]));
    store.set_opt_out(&BTreeSet::new()).unwrap();
    assert_eq!(flag(), 0);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn an_exclusion_that_the_kernel_refused_is_tried_again() {
    let node = Node::new();
    let mut store = node.open().unwrap();
    let too_many: BTreeSet<u64> = (1..=5_000).collect();
    // Nothing to write to yet: the first maps are given them.
    store.set_opt_out(&too_many).unwrap();
    for _ in 0..2 {
        let error = store.reserve(&Capacity::default()).unwrap_err().to_string();
        assert!(error.contains("OPTOUT"), "{error}");
    }
    store.set_opt_out(&BTreeSet::new()).unwrap();
    store.reserve(&Capacity::default()).unwrap();
    fill(&mut store);
    store.publish().unwrap();
    for _ in 0..2 {
        let error = store.set_opt_out(&too_many).unwrap_err().to_string();
        assert!(error.contains("OPTOUT"), "{error}");
    }
    store.set_opt_out(&BTreeSet::from([7])).unwrap();
    assert_eq!(node.view().pins.opt_out().unwrap(), BTreeSet::from([7]));
}

#[test]
#[ignore = "needs CAP_BPF"]
fn cleanup_leaves_nothing_and_is_refused_while_an_agent_runs() {
    let node = Node::new();
    let store = node.published();
    let error = cleanup(&node.bpf_dir).unwrap_err().to_string();
    assert!(error.contains("another agent"), "{error}");
    drop(store);
    cleanup(&node.bpf_dir).unwrap();
    assert!(!node.bpf_dir.exists());
    let served = fs::File::open(&node.cgroup).unwrap();
    for hook in Hook::ALL {
        if let Place::Cgroup(place) = hook.place() {
            let left = super::super::sys::prog_query(&served, place).unwrap();
            assert!(left.is_empty(), "{}: {left:?}", hook.name());
        }
    }
}

#[test]
#[ignore = "needs CAP_BPF"]
fn this_node_can_run_the_programs() {
    let node = Node::new();
    let report = probe::probe(&node.bpf_dir, Some(&node.cgroup));
    assert_eq!(report.missing, []);
    assert!(report.is_usable() && !report.kernel.is_empty());
}

/// Re-pins what `node` has as an agent of another ABI would have made it: values longer or shorter by two words.
fn change_abi(node: &Node) {
    let other = 3 - ABI_VERSION;
    let dir = Directory::look(&node.bpf_dir).unwrap();
    let (generation, fds) = newest_complete(&dir).unwrap();
    let aged = dir.create_generation(other, generation.number + 1).unwrap();
    for (name, fd) in &fds {
        let grows = ["SERVICES", "SLOTS", "MEMBERS"].contains(&name.as_str());
        if !grows && name != "META" {
            aged.pin(name, fd).unwrap();
            continue;
        }
        let info = super::super::sys::map_info(fd).unwrap();
        let value_size = match other {
            _ if !grows => info.value_size,
            2 => info.value_size + 16,
            _ => info.value_size - 16,
        };
        let spec = MapSpec {
            name: name.clone(),
            map_type: info.type_,
            key_size: info.key_size,
            value_size,
            max_entries: info.max_entries,
            flags: info.map_flags,
            btf_types: (0, 0),
        };
        let map = super::super::sys::map_create(&spec, None, None).unwrap();
        let from = Array::new(fd.try_clone().unwrap(), false).unwrap();
        let to = Array::new(map.try_clone().unwrap(), true).unwrap();
        to.copy_from(&from);
        if name == "META" {
            let meta = Meta {
                abi_version: other,
                generation: aged.number,
                ..to.read(0)
            };
            to.write(0, &meta);
        }
        aged.pin(name, &map).unwrap();
    }
    fs::remove_dir_all(&generation.path).unwrap();
}

#[test]
#[ignore = "needs CAP_BPF"]
fn maps_of_another_abi_are_carried_over_with_their_ids() {
    let node = Node::new();
    let store = node.published();
    store.tables().stats.add(2, 0, 5);
    drop(store);
    change_abi(&node);
    let before = node.view().pins.maps().unwrap();
    assert_eq!(
        node.view().service(2).unwrap().cluster,
        SetWord::new(7, 1, 5),
        "readable by any ABI"
    );
    let links = node.links();

    let mut store = node.open().unwrap();
    assert_filled(&store);
    assert_eq!(store.generation(), 3);
    assert_eq!(
        node.links(),
        links,
        "the hooks do not move before the first sync"
    );
    store.publish().unwrap();
    assert_filled(&store);
    assert_eq!(store.stats(2).connections, 5);
    assert_moved(&links, &node.links());
    assert_eq!(
        replaced(&before, &node.view().pins.maps().unwrap()),
        [
            "FRONTENDS",
            "LOCAL_ADDRS",
            "MEMBERS",
            "META",
            "NAMES",
            "SERVICES",
            "SLOTS",
            "STATS",
            "VIPS"
        ]
    );
    assert_eq!(store.dir.generations().unwrap().len(), 1);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_hook_that_somebody_unpinned_is_attached_again() {
    let node = Node::new();
    drop(node.published());
    let pin = |name: &str| node.bpf_dir.join("links").join(name);
    // As if an agent had died between making the link and giving it its place.
    fs::rename(pin("connect4"), pin("connect4_new")).unwrap();
    let before = node.links();
    let mut store = node.open().unwrap();
    store.publish().unwrap();
    assert_eq!(
        (before.len(), node.links().len()),
        (Hook::ALL.len() - 1, Hook::ALL.len())
    );
    assert!(!pin("connect4_new").exists());
}

#[test]
#[ignore = "needs CAP_BPF"]
fn other_constants_move_the_hooks_that_use_them_and_keep_the_maps() {
    let node = Node::new();
    drop(node.published());
    let before = node.links();
    let mut store = KernelStore::open(OpenOptions {
        log: true,
        ..node.options()
    })
    .unwrap();
    store.publish().unwrap();
    assert_eq!(store.generation(), 1);
    let moved = |hook: Hook| {
        let place = Hook::ALL.iter().position(|other| *other == hook).unwrap();
        let (new, old) = (node.links()[place], before[place]);
        assert_eq!(new.0, old.0);
        new.1 != old.1
    };
    assert!(moved(Hook::Connect4) && !moved(Hook::GetPeerName4));
}

#[test]
#[ignore = "needs CAP_BPF"]
fn without_memory_for_larger_maps_all_is_as_it_was() {
    let node = Node::new();
    let mut store = node.published();
    let links = node.links();
    // 137 GB, which the kernel refuses by arithmetic: more than the machine has.
    let need = Capacity {
        members: 1 << 31,
        ..store.capacity()
    };
    let error = store.reserve(&need).unwrap_err().to_string();
    assert!(
        error.contains("cannot create map MEMBERS") && error.contains("memory"),
        "{error}"
    );
    assert_filled(&store);
    assert_eq!((store.generation(), node.links()), (1, links));
    assert_eq!(store.dir.generations().unwrap().len(), 1);
    store
        .reserve(&Capacity {
            members: 5_000,
            ..store.capacity()
        })
        .unwrap();
    assert_filled(&store);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn a_refused_program_is_told_with_the_verifiers_words_and_the_old_ones_stay() {
    let node = Node::new();
    let mut store = node.published();
    let links = node.links();
    let object = spoiled(&store, Hook::SendMsg6);
    let error = store.move_hooks(&object).unwrap_err().to_string();
    assert!(
        error.starts_with("the kernel refuses program sendmsg6"),
        "{error}"
    );
    assert!(error.contains("R9 !read_ok"), "{error}");
    assert!(try_load(&object).is_err(), "found at the start already");
    assert_eq!(node.links(), links);
    assert_filled(&store);
}

#[test]
#[ignore = "needs CAP_BPF"]
fn an_iterator_that_the_kernel_refuses_is_left_out_with_the_reason() {
    let node = Node::new();
    let mut store = node.published();
    let object = spoiled(&store, Hook::KillDead);
    store.move_hooks(&object).unwrap();
    let left_out = store.left_out();
    assert_eq!(left_out.len(), 1, "{left_out:#?}");
    assert_eq!(left_out[0].program, "kill_dead");
    assert!(left_out[0].reason.contains("R9 !read_ok"), "{left_out:#?}");
}

#[test]
#[ignore = "needs CAP_BPF"]
fn the_maps_can_be_read_while_generations_are_swapped() {
    let node = Node::new();
    let mut store = node.published();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut read = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) || read == 0 {
                assert_eq!(node.view().frontends().unwrap().len(), 1);
                read += 1;
            }
        });
        let swapped = (1..=5).try_for_each(|swap| {
            let need = Capacity {
                vips: 1024 << swap,
                ..store.capacity()
            };
            store.reserve(&need)
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap();
        swapped.unwrap();
    });
    assert_eq!(store.generation(), 6);
}
