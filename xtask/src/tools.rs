//! The Kubernetes components that the tests run for real: found, or built from the Go modules below `tests/tools`.
//!
//! All of them end up in one folder, which the tests know by [`FOLDER`].

use std::{
    env, fs,
    io::ErrorKind,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::process::{self, Workspace};

/// Environment variable with the folder that holds all [`TOOLS`].
pub const FOLDER: &str = "PROXY_KUBE_TOOLS";

/// Where such binaries are by the convention of Kubernetes' own tests.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// The oldest Go that fetches the one which the modules ask for.
const OLDEST_GO: (u32, u32) = (1, 21);

/// A program built from a Go module.
#[derive(Debug)]
struct Tool {
    name: &'static str,
    /// Folder of the module below `tests/tools`.
    module: &'static str,
    package: &'static str,
    /// Flags for the linker, beside those that leave out what only a debugger reads.
    flags: &'static str,
}

/// Built from the module alone a component does not know its version.
const VERSION: &str = "-X k8s.io/component-base/version.gitVersion=v1.36.3";

const TOOLS: [Tool; 8] = [
    Tool {
        name: "kube-proxy",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-proxy",
        flags: VERSION,
    },
    Tool {
        name: "kube-apiserver",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
        flags: VERSION,
    },
    Tool {
        name: "kubectl",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kubectl",
        flags: VERSION,
    },
    Tool {
        name: "etcd",
        module: "etcd",
        package: "go.etcd.io/etcd/server/v3",
        flags: "",
    },
    Tool {
        name: "kube-controller-manager",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
        flags: VERSION,
    },
    Tool {
        name: "kube-scheduler",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-scheduler",
        flags: VERSION,
    },
    Tool {
        name: "kubelet",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kubelet",
        flags: VERSION,
    },
    Tool {
        name: "coredns",
        module: "coredns",
        package: "github.com/coredns/coredns",
        flags: "",
    },
];

/// Finds or builds all tools; says where they are. The first build takes minutes.
///
/// # Errors
/// One does not build.
pub fn ensure(workspace: &Workspace) -> Result<PathBuf> {
    let folder = folder(workspace);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for tool in &TOOLS {
        match tool.find() {
            Some(file) => tool.link(&folder, &file)?,
            None => tool.build(workspace, &folder)?,
        }
    }
    Ok(folder)
}

/// Whether [`ensure`] can succeed: what it will use.
pub fn probe(workspace: &Workspace) -> Result<String, String> {
    let folder = folder(workspace);
    let is_ready =
        |tool: &&Tool| tool.find().is_some() || tool.is_built(workspace, &folder).unwrap_or(false);
    let missing: Vec<_> = TOOLS.iter().filter(|tool| !is_ready(tool)).collect();
    if missing.is_empty() {
        return Ok(folder.display().to_string());
    }
    let names: Vec<_> = missing.iter().map(|tool| tool.name).collect();
    let said = process::answer(workspace.command("go").arg("version"))
        .ok_or_else(|| format!("{} are not there, nor is Go", names.join(", ")))?;
    match go_version(&said) {
        Some(version) if version >= OLDEST_GO => Ok(said.trim().to_owned()),
        Some(_) | None => Err(format!("{} is too old", said.trim())),
    }
}

fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target("tools")
}

/// Of "go version go1.26.8 linux/amd64".
fn go_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(' ').nth(2)?.strip_prefix("go")?.split('.');
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

impl Tool {
    /// The one that somebody provides.
    fn find(&self) -> Option<PathBuf> {
        let assets = env::var_os(ASSETS).map(|folder| Path::new(&folder).join(self.name));
        let assets = assets.filter(|file| file.is_file());
        assets.or_else(|| process::in_path(self.name))
    }

    fn link(&self, folder: &Path, file: &Path) -> Result<()> {
        let link = folder.join(self.name);
        for old in [&link, &self.stamp(folder)] {
            match fs::remove_file(old) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", old.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        symlink(file, &link).with_context(|| format!("cannot make {}", link.display()))
    }

    fn build(&self, workspace: &Workspace, folder: &Path) -> Result<()> {
        if self.is_built(workspace, folder)? {
            return Ok(());
        }
        println!(
            "building {} from {}: takes minutes the first time",
            self.name, self.package
        );
        let file = folder.join(self.name);
        let mut go = workspace.command("go");
        go.current_dir(self.sources(workspace));
        // The workspace's own file of modules counts, nothing of the user's.
        go.env("GOWORK", "off").env("GOFLAGS", "-mod=readonly");
        go.args(["build", "-buildvcs=false", "-o"]).arg(&file);
        go.args(["-ldflags", &format!("-s -w {}", self.flags), self.package]);
        process::run_quietly(&mut go)
            .with_context(|| format!("cannot build {} for the tests", self.name))?;
        let stamp = self.stamp(folder);
        fs::write(&stamp, self.recipe(workspace)?)
            .with_context(|| format!("cannot write {}", stamp.display()))
    }

    /// Whether the binary is what its module says now.
    fn is_built(&self, workspace: &Workspace, folder: &Path) -> Result<bool> {
        let built_from = fs::read_to_string(self.stamp(folder)).unwrap_or_default();
        Ok(folder.join(self.name).is_file() && built_from == self.recipe(workspace)?)
    }

    /// All that decides what is built; the sums follow from the module file.
    fn recipe(&self, workspace: &Workspace) -> Result<String> {
        let file = self.sources(workspace).join("go.mod");
        let module = fs::read_to_string(&file);
        let module = module.with_context(|| format!("cannot read {}", file.display()))?;
        let Self { package, flags, .. } = self;
        Ok(format!("{package} {flags}\n{module}"))
    }

    fn stamp(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.built-from", self.name))
    }

    fn sources(&self, workspace: &Workspace) -> PathBuf {
        workspace.root.join("tests/tools").join(self.module)
    }
}

/// Runs the build that `cargo xtask tools` asks for.
///
/// # Errors
/// As [`ensure`].
pub fn run(workspace: &Workspace) -> Result<()> {
    if let Err(wrong) = probe(workspace) {
        bail!(
            "cannot have the Kubernetes components: {wrong}; `cargo xtask check` says what to do"
        );
    }
    println!("{}", ensure(workspace)?.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_go_is_read() {
        assert_eq!(
            go_version("go version go1.26.8 linux/amd64\n"),
            Some((1, 26))
        );
        assert_eq!(go_version("go version go1.21 linux/arm64\n"), Some((1, 21)));
        assert_eq!(go_version("go version devel linux/arm64\n"), None);
    }

    #[test]
    fn every_tool_is_built_from_a_module_that_names_it() {
        let workspace = Workspace::find();
        for tool in &TOOLS {
            let recipe = tool.recipe(&workspace).unwrap();
            let is_named = |line: &str| {
                let line = line.trim().trim_start_matches("tool ");
                line == tool.package
            };
            assert!(recipe.lines().skip(1).any(is_named), "{recipe}");
        }
    }
}
