//! A folder followed live. Waits on updates with a deadline; that nothing comes is shown by what comes next.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n---\n"
    )
}

struct Followed {
    dir: TempDir,
    updates: mpsc::Receiver<Update>,
    problems: watch::Receiver<Vec<Problem>>,
}

impl Followed {
    /// Follows a folder that `fill` has put something into.
    fn new(fill: impl FnOnce(&Path)) -> Self {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        fill(&dir.path().join("m"));
        let (sender, updates) = mpsc::channel(16);
        let problems = start(&dir.path().join("m"), NodeName::new("node-a"), sender).unwrap();
        Self {
            dir,
            updates,
            problems,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("m").join(name)
    }

    /// The next update: "name=ip" of changed Services, "name=" of deleted ones, and whether everything is known.
    fn next(&mut self) -> (Vec<String>, bool) {
        let end = Instant::now() + DEADLINE;
        loop {
            match self.updates.try_recv() {
                Ok(Update::Objects(objects)) => {
                    let changes = objects.services.iter().map(|(name, service)| {
                        let ip = service
                            .as_ref()
                            .map(|service| service.cluster_ips[0].to_string());
                        let short = name.as_str().trim_start_matches("default/");
                        format!("{short}={}", ip.unwrap_or_default())
                    });
                    return (changes.collect(), objects.complete);
                }
                Ok(Update::Addresses(_)) => panic!("addresses from files"),
                Err(_) => assert!(
                    Instant::now() < end,
                    "no update; problems: {:?}",
                    self.problems.borrow()
                ),
            }
            thread::yield_now();
        }
    }

    fn changes(&mut self) -> Vec<String> {
        self.next().0
    }

    fn wait_for_problem(&mut self, text: &str) {
        let end = Instant::now() + DEADLINE;
        while !self
            .problems
            .borrow()
            .iter()
            .any(|problem| problem.what.contains(text))
        {
            assert!(
                Instant::now() < end,
                "not told: {text}; problems: {:?}",
                self.problems.borrow()
            );
            thread::yield_now();
        }
    }
}

#[test]
fn the_first_update_is_everything_and_even_nothing_is_told() {
    let mut followed = Followed::new(|_| {});
    assert_eq!(followed.next(), (vec![], true));
    let mut followed =
        Followed::new(|dir| fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap());
    assert_eq!(followed.next(), (vec!["a=10.0.0.1".into()], true));
}

#[test]
fn a_folder_that_is_not_there_is_a_clear_error() {
    let (sender, _updates) = mpsc::channel(1);
    let error = start(
        Path::new("/no/such/folder"),
        NodeName::new("node-a"),
        sender,
    )
    .unwrap_err();
    let printed = format!("{:#}", anyhow::Error::from(error));
    assert_eq!(
        printed,
        "cannot read the manifests in /no/such/folder: No such file or directory (os error 2); give --manifests an existing folder"
    );
}

#[test]
fn a_file_counts_when_it_is_closed_and_not_before() {
    use std::io::Write;
    let mut followed = Followed::new(|_| {});
    followed.next();
    let mut half = fs::File::create(followed.path("half.yaml")).unwrap();
    half.write_all(service("half", "10.0.0.1").as_bytes())
        .unwrap();
    // A folder makes it read everything, but not that file.
    fs::create_dir(followed.path("sub")).unwrap();
    fs::write(followed.path("sub/b.yaml"), service("b", "10.0.0.2")).unwrap();
    assert_eq!(followed.changes(), ["b=10.0.0.2"]);
    drop(half);
    assert_eq!(followed.changes(), ["half=10.0.0.1"]);
}

#[test]
fn a_rename_is_one_change() {
    let mut followed =
        Followed::new(|dir| fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap());
    followed.next();
    fs::write(
        followed.path("a.new"),
        service("a", "10.0.0.2") + &service("b", "10.0.0.3"),
    )
    .unwrap();
    fs::rename(followed.path("a.new"), followed.path("a.yaml")).unwrap();
    assert_eq!(followed.changes(), ["a=10.0.0.2", "b=10.0.0.3"]);
    fs::rename(followed.path("a.yaml"), followed.path("a.off")).unwrap();
    assert_eq!(followed.changes(), ["a=", "b="]);
    fs::remove_file(followed.path("a.off")).unwrap();
    fs::write(followed.path("c.json"), "").unwrap();
    fs::hard_link(followed.path("c.json"), followed.path("d.json")).unwrap();
    fs::write(followed.path("e.yaml"), service("e", "10.0.0.4")).unwrap();
    assert_eq!(followed.changes(), ["e=10.0.0.4"]);
}

#[test]
fn the_swap_of_a_config_map_volume_is_one_change() {
    let version = |dir: &Path, name: &str, ip: &str| {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("a.yaml"), service("a", ip)).unwrap();
        fs::write(
            dir.join(name).join("b.yaml"),
            service("b", ip).replace("80", "81"),
        )
        .unwrap();
    };
    let mut followed = Followed::new(|dir| {
        version(dir, "..1", "10.0.0.1");
        symlink("..1", dir.join("..data")).unwrap();
        symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
        symlink("..data/b.yaml", dir.join("b.yaml")).unwrap();
    });
    assert_eq!(followed.changes(), ["a=10.0.0.1", "b=10.0.0.1"]);
    version(&followed.path(""), "..2", "10.0.0.2");
    symlink("..2", followed.path("..data_tmp")).unwrap();
    fs::rename(followed.path("..data_tmp"), followed.path("..data")).unwrap();
    fs::remove_dir_all(followed.path("..1")).unwrap();
    assert_eq!(followed.changes(), ["a=10.0.0.2", "b=10.0.0.2"]);
}

#[test]
fn a_burst_is_one_update_and_nested_folders_are_followed() {
    let mut followed = Followed::new(|_| {});
    followed.next();
    fs::create_dir_all(followed.path("one/two")).unwrap();
    fs::write(followed.path("one/two/a.yaml"), service("a", "10.0.0.1")).unwrap();
    assert_eq!(followed.changes(), ["a=10.0.0.1"]);
    for n in 0..5 {
        fs::write(
            followed.path(&format!("one/two/{n}.yaml")),
            service(&format!("s{n}"), "10.0.0.2"),
        )
        .unwrap();
    }
    assert_eq!(followed.changes().len(), 5);
    fs::remove_dir_all(followed.path("one")).unwrap();
    assert_eq!(followed.changes().len(), 6);
}

#[test]
fn a_broken_file_is_told_keeps_its_content_and_is_forgotten_when_mended() {
    let mut followed = Followed::new(|dir| {
        fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
        fs::write(dir.join("b.yaml"), "kind: [").unwrap();
    });
    assert_eq!(followed.next(), (vec!["a=10.0.0.1".into()], false));
    assert_eq!(followed.problems.borrow().len(), 1);
    fs::write(followed.path("b.yaml"), service("b", "10.0.0.2")).unwrap();
    assert_eq!(followed.next(), (vec!["b=10.0.0.2".into()], true));
    assert_eq!(*followed.problems.borrow(), []);
    fs::write(followed.path("a.yaml"), "kind: [").unwrap();
    followed.wait_for_problem("last good content stays in use");
    fs::write(followed.path("b.yaml"), service("b", "10.0.0.3")).unwrap();
    assert_eq!(followed.changes(), ["b=10.0.0.3"], "a is as it was");
}

#[test]
fn deleted_files_are_obeyed() {
    let mut followed =
        Followed::new(|dir| fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap());
    followed.next();
    fs::remove_file(followed.path("a.yaml")).unwrap();
    assert_eq!(followed.changes(), ["a="]);
}

#[test]
fn a_vanished_folder_changes_nothing_until_it_is_back_with_something_in_it() {
    let mut followed = Followed::new(|dir| {
        fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
        fs::write(dir.join("b.yaml"), service("b", "10.0.0.2")).unwrap();
    });
    followed.next();
    fs::remove_dir_all(followed.path("")).unwrap();
    followed.wait_for_problem("cannot read the folder of manifests: No such file");
    fs::create_dir(followed.path("")).unwrap();
    followed.wait_for_problem("an empty folder stands in its place");
    fs::write(followed.path("a.yaml"), service("a", "10.0.0.3")).unwrap();
    assert_eq!(followed.changes(), ["a=10.0.0.3", "b="]);
    assert_eq!(*followed.problems.borrow(), []);
    fs::write(followed.path("c.yaml"), service("c", "10.0.0.4")).unwrap();
    assert_eq!(followed.changes(), ["c=10.0.0.4"], "it is watched again");
}

#[test]
fn a_folder_put_in_the_place_of_another_is_read() {
    let mut followed =
        Followed::new(|dir| fs::write(dir.join("a.yaml"), service("a", "10.0.0.1")).unwrap());
    followed.next();
    let other = followed.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("b.yaml"), service("b", "10.0.0.2")).unwrap();
    fs::rename(followed.path(""), followed.dir.path().join("aside")).unwrap();
    fs::rename(&other, followed.path("")).unwrap();
    assert_eq!(followed.changes(), ["a=", "b=10.0.0.2"]);
}
