//! How large each map is, which outlive a generation, and whether a pinned object is what its name says.

use aya_obj::generated::{bpf_map_info, bpf_map_type};

use super::super::{store::Capacity, sys, sys::MapSpec};

/// Clients that are remembered: 65,536 pairs of a Service and a pod are two hundred of each on a node, in 9 MB.
const AFFINITY_ENTRIES: u32 = 65_536;
/// Translations beyond the four of a socket's own storage; each takes two entries.
const PEERS_ENTRIES: u32 = 65_536;
/// Excluded cgroups.
const OPT_OUT_ENTRIES: u32 = 4_096;
/// Bytes of aya-log's ring buffer.
const LOG_BYTES: u32 = 128 << 10;

/// What becomes of a map in a generation swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Describes the generation: each has its own.
    Meta,
    /// Follows the cluster; filled by the agent.
    Table,
    /// Filled by the programs, or by the agent with what has no ids, and frozen in its layout: the same object in every
    /// generation. With this many entries.
    Carried(u32),
}

/// Role of the map called `name`.
pub fn role(name: &str, spec: &MapSpec) -> Role {
    match name {
        "META" => Role::Meta,
        "SERVICES" | "NAMES" | "STATS" | "SLOTS" | "MEMBERS" | "FRONTENDS" | "VIPS"
        | "LOCAL_ADDRS" => Role::Table,
        "AFFINITY" => Role::Carried(AFFINITY_ENTRIES),
        "PEERS" => Role::Carried(PEERS_ENTRIES),
        "OPTOUT" => Role::Carried(OPT_OUT_ENTRIES),
        "AYA_LOGS" => Role::Carried(LOG_BYTES),
        _ => Role::Carried(spec.max_entries),
    }
}

/// Entries of the table called `name`.
pub fn entries_of(capacity: &Capacity, name: &str) -> u32 {
    match name {
        "SERVICES" | "NAMES" | "STATS" => capacity.services,
        "SLOTS" => capacity.slots,
        "MEMBERS" => capacity.members,
        "FRONTENDS" => capacity.frontends,
        "VIPS" => capacity.vips,
        "LOCAL_ADDRS" => capacity.addresses,
        _ => 1,
    }
}

/// Sizes for `need` entries, which have their headroom already: never so few that 1,000 changes a second, each of which takes
/// new slots and perhaps a member, would wait for the grace period of the old ones.
pub fn sizes(need: &Capacity) -> Capacity {
    Capacity {
        services: need.services.max(1 << 10),
        slots: need.slots.max(1 << 16),
        members: need.members.max(1 << 14),
        frontends: need.frontends.max(1 << 12),
        vips: need.vips.max(1 << 10),
        addresses: need.addresses.max(1 << 8),
    }
}

/// The smallest legal size of the map called `name`.
pub fn smallest(name: &str, spec: &MapSpec) -> u32 {
    match role(name, spec) {
        Role::Meta | Role::Table => 1,
        // Sizes of a ring buffer are pages; those of LRU maps are spread over the CPUs.
        Role::Carried(entries) => entries.min(4096),
    }
}

/// Whether `capacity` holds `need`.
pub fn holds(capacity: &Capacity, need: &Capacity) -> bool {
    capacity.services >= need.services
        && capacity.slots >= need.slots
        && capacity.members >= need.members
        && capacity.frontends >= need.frontends
        && capacity.vips >= need.vips
        && capacity.addresses >= need.addresses
}

/// Whether `info` describes a map made for `spec`: by this agent's ABI, or by another one.
///
/// # Errors
/// What is different.
pub fn check(
    name: &str,
    spec: &MapSpec,
    info: &bpf_map_info,
    same_abi: bool,
) -> Result<(), String> {
    let role = role(name, spec);
    let same_value = match role {
        Role::Carried(_) => info.value_size == spec.value_size,
        Role::Meta | Role::Table => info.value_size == spec.value_size || !same_abi,
    };
    let kernel_name = sys::name_of(&info.name);
    let expected: String = name.chars().take(15).collect();
    if kernel_name != expected {
        return Err(format!("{name} is another map, called {kernel_name:?}"));
    }
    if info.type_ != spec.map_type || info.key_size != spec.key_size || !same_value {
        return Err(format!(
            "{name} is a {} of {} B keys and {} B values, not a {} of {} and {}",
            type_name(info.type_),
            info.key_size,
            info.value_size,
            type_name(spec.map_type),
            spec.key_size,
            spec.value_size
        ));
    }
    if info.map_flags != spec.flags {
        return Err(format!(
            "{name} has flags {:#x}, not {:#x}",
            info.map_flags, spec.flags
        ));
    }
    let fixed = matches!(role, Role::Meta) || matches!(name, "REASONS" | "CONNECTIONS");
    if fixed && info.max_entries != spec.max_entries {
        return Err(format!(
            "{name} has {} entries, not {}",
            info.max_entries, spec.max_entries
        ));
    }
    Ok(())
}

/// The kernel's word for a map type, lower case.
pub fn type_name(map_type: u32) -> &'static str {
    const KNOWN: [(bpf_map_type, &str); 9] = [
        (bpf_map_type::BPF_MAP_TYPE_HASH, "hash"),
        (bpf_map_type::BPF_MAP_TYPE_ARRAY, "array"),
        (bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH, "percpu_hash"),
        (bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, "percpu_array"),
        (bpf_map_type::BPF_MAP_TYPE_LRU_HASH, "lru_hash"),
        (bpf_map_type::BPF_MAP_TYPE_LPM_TRIE, "lpm_trie"),
        (bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, "array_of_maps"),
        (bpf_map_type::BPF_MAP_TYPE_SK_STORAGE, "sk_storage"),
        (bpf_map_type::BPF_MAP_TYPE_RINGBUF, "ringbuf"),
    ];
    KNOWN
        .iter()
        .find(|(known, _)| *known as u32 == map_type)
        .map_or("map of another type", |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_clusters_get_small_maps_and_large_ones_what_they_ask_for() {
        let small = sizes(&Capacity::default());
        assert_eq!(
            (small.services, small.slots, small.addresses),
            (1024, 65_536, 256)
        );
        let need = Capacity {
            slots: 70_000,
            members: 20_000,
            ..Capacity::default()
        };
        let sized = sizes(&need);
        assert_eq!((sized.slots, sized.members), (70_000, 20_000));
        assert!(holds(&sized, &need) && !holds(&small, &need));
    }

    #[test]
    fn a_value_of_another_size_is_foreign_unless_the_abi_is_another() {
        let spec = MapSpec {
            name: "SLOTS".to_owned(),
            map_type: 2,
            key_size: 4,
            value_size: 32,
            max_entries: 1,
            flags: 1024,
            btf_types: (0, 0),
        };
        let mut name = [0; 16];
        for (to, from) in name.iter_mut().zip(b"SLOTS") {
            *to = *from as core::ffi::c_char;
        }
        let info = bpf_map_info {
            type_: 2,
            key_size: 4,
            value_size: 48,
            max_entries: 4096,
            map_flags: 1024,
            name,
            ..sys::zeroed_map_info()
        };
        assert_eq!(check("SLOTS", &spec, &info, false), Ok(()));
        let told = check("SLOTS", &spec, &info, true).unwrap_err();
        assert!(told.contains("48 B values"), "{told}");
        assert!(
            check("MEMBERS", &spec, &info, false)
                .unwrap_err()
                .contains("\"SLOTS\"")
        );
    }
}
