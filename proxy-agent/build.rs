//! Embeds the object of the eBPF programs that `cargo xtask build` made; without one the agent says so when it runs.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    let object = object();
    println!("cargo::rerun-if-env-changed=PROXY_EBPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("programs.o");
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(&out, bytes).expect("the build directory is writable");
}

/// The object named by PROXY_EBPF_OBJECT, else where xtask puts it.
fn object() -> PathBuf {
    if let Some(object) = env::var_os("PROXY_EBPF_OBJECT") {
        println!("cargo::rerun-if-changed={}", Path::new(&object).display());
        return object.into();
    }
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../target"),
        PathBuf::from,
    );
    let directory = target.join("bpf");
    // Watched as a whole: a missing file would count as changed in every build. Best effort, for read-only checkouts.
    let _ = fs::create_dir_all(&directory);
    println!("cargo::rerun-if-changed={}", directory.display());
    directory.join(match env::var_os("CARGO_FEATURE_ABI_NEXT") {
        Some(_) => "proxy-ebpf-next",
        None => "proxy-ebpf",
    })
}
