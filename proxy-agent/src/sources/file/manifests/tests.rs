use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::model::ServiceName;

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n---\n"
    )
}

struct Folder {
    dir: TempDir,
    manifests: Manifests,
}

impl Folder {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let manifests = Manifests::new(dir.path(), NodeName::new("node-a"));
        Self { dir, manifests }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn scan(&mut self) -> Objects {
        self.manifests.scan(&BTreeSet::new(), &mut |_| {}).unwrap()
    }

    fn reload(&mut self, name: &str) -> Objects {
        self.manifests.reload(&[self.path(name)])
    }

    fn problems(&self) -> Vec<String> {
        let root = format!("{}/", self.dir.path().display());
        let problems = self.manifests.problems();
        problems
            .iter()
            .map(|problem| problem.to_string().replace(&root, ""))
            .collect()
    }
}

/// "name=ip" of the changed Services, "name=" of a deleted one.
fn changed(objects: &Objects) -> Vec<String> {
    let services = objects.services.iter().map(|(name, service)| {
        let ip = service
            .as_ref()
            .map(|service| service.cluster_ips[0].to_string());
        let short = name.as_str().trim_start_matches("default/");
        format!("{short}={}", ip.unwrap_or_default())
    });
    services.collect()
}

#[test]
fn a_scan_reads_nested_folders_and_then_only_what_changed() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.write("deep/er/b.yml", &service("b", "10.0.0.2"));
    folder.write("notes.txt", "nothing");
    folder.write(".hidden.yaml", &service("h", "10.0.0.9"));
    let first = folder.scan();
    assert_eq!(changed(&first), ["a=10.0.0.1", "b=10.0.0.2"]);
    assert!(first.complete);
    assert!(folder.scan().is_empty());
    folder.write("a.yaml", &service("a", "10.0.0.11"));
    fs::remove_file(folder.path("deep/er/b.yml")).unwrap();
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.11", "b="]);
}

#[test]
fn a_half_written_file_is_left_alone_by_a_scan() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    let writing = BTreeSet::from([folder.path("a.yaml")]);
    assert!(
        folder
            .manifests
            .scan(&writing, &mut |_| {})
            .unwrap()
            .is_empty()
    );
    assert_eq!(changed(&folder.reload("a.yaml")), ["a=10.0.0.1"]);
}

#[test]
fn a_broken_file_keeps_its_last_good_content_and_the_others_go_on() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.write("b.yaml", &service("b", "10.0.0.2"));
    folder.scan();
    folder.write("a.yaml", "kind: [");
    folder.write("b.yaml", &service("b", "10.0.0.22"));
    let objects = folder.scan();
    assert_eq!(changed(&objects), ["b=10.0.0.22"]);
    assert!(objects.complete, "what the file held is known");
    assert_eq!(folder.problems().len(), 1);
    assert!(
        folder.problems()[0].starts_with("a.yaml:"),
        "{:?}",
        folder.problems()
    );
    folder.write("a.yaml", &service("a", "10.0.0.11"));
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.11"]);
    assert_eq!(folder.problems(), Vec::<String>::new());
}

#[test]
fn a_broken_file_at_start_holds_up_deletions_until_it_is_mended() {
    for mended in [true, false] {
        let mut folder = Folder::new();
        folder.write("a.yaml", "kind: [");
        folder.write("b.yaml", &service("b", "10.0.0.2"));
        let objects = folder.scan();
        assert_eq!(changed(&objects), ["b=10.0.0.2"]);
        assert!(!objects.complete);
        if mended {
            folder.write("a.yaml", &service("a", "10.0.0.1"));
        } else {
            fs::remove_file(folder.path("a.yaml")).unwrap();
        }
        assert!(folder.scan().complete);
        folder.write("c.yaml", "kind: [");
        assert!(folder.scan().complete, "a new broken file hides nothing");
    }
}

#[test]
fn an_impossible_object_keeps_its_last_good_version() {
    let mut folder = Folder::new();
    let both =
        |port| service("a", "10.0.0.1") + &service("b", "10.0.0.2").replace("port: 80", port);
    folder.write("a.yaml", &both("port: 80"));
    folder.scan();
    folder.write("a.yaml", &both("port: 0").replace("10.0.0.1", "10.0.0.11"));
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.11"]);
    assert_eq!(folder.problems().len(), 1);
    folder.write(
        "a.yaml",
        &both("port: 8080").replace("10.0.0.1", "10.0.0.11"),
    );
    assert_eq!(changed(&folder.scan()), ["b=10.0.0.2"]);
}

#[test]
fn an_impossible_object_at_start_holds_up_deletions_and_a_missing_cluster_ip_does_not() {
    let mut folder = Folder::new();
    folder.write(
        "a.yaml",
        &service("a", "10.0.0.1").replace("clusterIP: 10.0.0.1, ", ""),
    );
    assert!(folder.scan().complete);
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1.2"));
    assert!(!folder.scan().complete);
}

#[test]
fn of_the_same_object_in_two_files_the_first_path_counts() {
    let mut folder = Folder::new();
    folder.write("b.yaml", &service("a", "10.0.0.2"));
    folder.scan();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.write("c.yaml", &service("a", "10.0.0.3"));
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.1"]);
    let problems = folder.problems();
    assert_eq!(problems.len(), 2);
    assert!(
        problems[0].starts_with("b.yaml: Service default/a is in"),
        "{problems:?}"
    );
    fs::remove_file(folder.path("a.yaml")).unwrap();
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.2"]);
    fs::remove_file(folder.path("c.yaml")).unwrap();
    assert!(folder.scan().is_empty());
    assert_eq!(folder.problems(), Vec::<String>::new());
}

#[test]
fn an_object_that_moves_between_files_is_one_change() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.scan();
    fs::rename(folder.path("a.yaml"), folder.path("b.yaml")).unwrap();
    assert!(folder.scan().is_empty());
}

#[test]
fn an_object_given_to_another_proxy_is_deleted() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.scan();
    let label = "name: a, labels: {service.kubernetes.io/service-proxy-name: \"\"}";
    folder.write(
        "a.yaml",
        &service("a", "10.0.0.1").replace("name: a", label),
    );
    let name = ServiceName::new("default", "a");
    assert_eq!(folder.scan().services, [(name, None)]);
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.1"]);
}

#[test]
fn an_empty_folder_is_obeyed() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.scan();
    fs::remove_file(folder.path("a.yaml")).unwrap();
    assert_eq!(changed(&folder.scan()), ["a="]);
}

#[test]
fn a_service_cidr_comes_changes_and_goes() {
    let cidr = |network: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {{name: more}}\nspec: {{cidrs: [{network}]}}\n"
        )
    };
    let networks = |objects: &Objects| -> Vec<Option<String>> {
        let cidrs = objects.service_cidrs.iter();
        cidrs
            .map(|(_, cidr)| cidr.as_ref().map(|cidr| cidr.networks[0].to_string()))
            .collect()
    };
    let mut folder = Folder::new();
    folder.write("cidr.yaml", &cidr("10.97.0.0/16"));
    assert_eq!(networks(&folder.scan()), [Some("10.97.0.0/16".to_owned())]);
    folder.write("cidr.yaml", &cidr("10.98.0.0/15"));
    assert_eq!(networks(&folder.scan()), [Some("10.98.0.0/15".to_owned())]);
    fs::remove_file(folder.path("cidr.yaml")).unwrap();
    assert_eq!(networks(&folder.scan()), [None]);
}

#[test]
fn a_link_to_a_folder_above_ends() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    std::os::unix::fs::symlink(folder.dir.path(), folder.path("loop")).unwrap();
    assert_eq!(changed(&folder.scan()), ["a=10.0.0.1"]);
}

#[test]
fn what_cannot_be_read_keeps_its_content_and_is_told() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &service("a", "10.0.0.1"));
    folder.write("sub/b.yaml", &service("b", "10.0.0.2"));
    folder.scan();
    // Root reads everything, but not this.
    fs::remove_file(folder.path("a.yaml")).unwrap();
    fs::create_dir(folder.path("d")).unwrap();
    nix::unistd::mkfifo(&folder.path("a.yaml"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::write(folder.path("d/c.yaml"), b"\xff\xfe").unwrap();
    assert!(folder.scan().is_empty());
    let problems = folder.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].starts_with("a.yaml: cannot read the file: it is not a regular file"));
    assert!(
        problems[1].starts_with("d/c.yaml: cannot read the file: "),
        "{problems:?}"
    );
    if !nix::unistd::geteuid().is_root() {
        fs::set_permissions(folder.path("sub"), fs::Permissions::from_mode(0o000)).unwrap();
        assert!(folder.scan().is_empty());
        fs::set_permissions(folder.path("sub"), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Objects as a model would hold them.
fn gather(held: &mut BTreeMap<String, String>, objects: &Objects) {
    for change in changed(objects) {
        let (name, ip) = change.split_once('=').unwrap();
        if ip.is_empty() {
            held.remove(name);
        } else {
            held.insert(name.into(), ip.into());
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    /// Each step gives a file new Services, or deletes it, and reads that file or everything.
    #[test]
    fn reading_bit_by_bit_equals_reading_afresh(
        steps in proptest::collection::vec((0..4_u8, proptest::option::of(proptest::collection::vec((0..4_u8, 1..4_u8), 0..3)), proptest::bool::ANY), 1..12)
    ) {
        let mut folder = Folder::new();
        let mut held = BTreeMap::new();
        for (file, services, by_scan) in steps {
            let file = format!("{file}.yaml");
            match services {
                Some(services) => {
                    let text = services.iter().map(|(name, ip)| service(&format!("s{name}"), &format!("10.0.0.{ip}")));
                    folder.write(&file, &text.collect::<String>());
                }
                None => drop(fs::remove_file(folder.path(&file))),
            }
            let objects = if by_scan { folder.scan() } else { folder.reload(&file) };
            gather(&mut held, &objects);
            let mut fresh = Manifests::new(folder.dir.path(), NodeName::new("node-a"));
            let mut all = BTreeMap::new();
            gather(&mut all, &fresh.scan(&BTreeSet::new(), &mut |_| {}).unwrap());
            proptest::prop_assert_eq!(&held, &all);
            proptest::prop_assert_eq!(folder.manifests.problems(), fresh.problems());
        }
    }
}
