use super::*;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.1
  ports:
  - name: http
    port: 80
";

fn yaml(text: &str) -> Result<Parsed, Fault> {
    parse(text, Format::Yaml, &NodeName::new("node-a"))
}

fn json(text: &str) -> Result<Parsed, Fault> {
    parse(text, Format::Json, &NodeName::new("node-a"))
}

fn keys(parsed: &Parsed) -> Vec<String> {
    parsed.objects.keys().map(ToString::to_string).collect()
}

fn service_json(name: &str) -> String {
    format!(
        r#"{{"spec":{{"clusterIP":"10.96.0.1","ports":[{{"port":80}}]}},"kind":"Service","metadata":{{"name":"{name}"}},"apiVersion":"v1"}}"#
    )
}

#[test]
fn several_documents_are_read_and_empty_ones_skipped() {
    let other = SERVICE.replace("web", "api");
    let parsed = yaml(&format!("---\n# nothing\n---\n{SERVICE}---\n{other}---\n")).unwrap();
    assert_eq!(
        keys(&parsed),
        ["Service default/api", "Service default/web"]
    );
    assert_eq!(parsed.faults, []);
    assert_eq!(keys(&yaml("").unwrap()), Vec::<String>::new());
}

#[test]
fn json_is_read_whatever_the_order_of_its_keys() {
    let parsed = json(&format!("{}\n{}", service_json("a"), service_json("b"))).unwrap();
    assert_eq!(keys(&parsed), ["Service default/a", "Service default/b"]);
    assert!(json("  ").unwrap().objects.is_empty());
}

#[test]
fn lists_of_every_kind_are_read() {
    let item = service_json("a");
    let bare =
        r#"{"metadata":{"name":"b"},"spec":{"clusterIP":"10.96.0.2","ports":[{"port":80}]}}"#;
    for list in [
        format!(r#"{{"apiVersion":"v1","kind":"List","items":[{item}]}}"#),
        format!(r#"{{"apiVersion":"v1","items":[{item}],"kind":"List","metadata":{{}}}}"#),
    ] {
        assert_eq!(keys(&json(&list).unwrap()), ["Service default/a"], "{list}");
    }
    for list in [
        format!(r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{}},"items":[{bare}]}}"#),
        format!(r#"{{"items":[{bare}],"kind":"ServiceList","apiVersion":"v1"}}"#),
    ] {
        assert_eq!(keys(&json(&list).unwrap()), ["Service default/b"], "{list}");
    }
    let nodes = r#"{"kind":"NodeList","apiVersion":"v1","items":[{"metadata":{"name":"node-a"}},{"metadata":{"name":"node-b"}}]}"#;
    assert_eq!(keys(&json(nodes).unwrap()), ["this Node"]);
    let cidrs = r#"{"kind":"ServiceCIDRList","apiVersion":"networking.k8s.io/v1","items":[{"metadata":{"name":"more"},"spec":{"cidrs":["10.97.0.0/16"]}}]}"#;
    assert_eq!(keys(&json(cidrs).unwrap()), ["ServiceCIDR more"]);
}

#[test]
fn other_kinds_are_passed_over() {
    let parsed = yaml("apiVersion: apps/v1\nkind: Deployment\nspec: {}\n").unwrap();
    assert_eq!(parsed.others, ["apps/v1 Deployment"]);
    assert!(parsed.objects.is_empty());
}

#[test]
fn a_broken_file_is_told_by_line_and_field() {
    let broken = SERVICE.replace("port: 80", "port: eighty");
    let fault = yaml(&format!("# one line\n{broken}")).unwrap_err();
    assert_eq!(fault.line, Some(10));
    assert!(
        fault
            .what
            .starts_with("spec.ports[0].port: invalid type: string \"eighty\""),
        "{}",
        fault.what
    );
    assert!(
        fault
            .what
            .ends_with("the file's last good content stays in use"),
        "{}",
        fault.what
    );

    let fault = yaml("apiVersion: v1\nkind: Service\n\tspec: {}\n").unwrap_err();
    assert!(
        fault.line == Some(3) && fault.what.contains("tab character"),
        "{fault:?}"
    );

    let fault = json("{\n\"apiVersion\": \"v1\",\n\"kind\": 7\n}").unwrap_err();
    assert_eq!(fault.line, Some(3), "{fault:?}");
    assert!(fault.what.starts_with("kind: "), "{}", fault.what);

    let fault = yaml("metadata:\n  name: a\n").unwrap_err();
    assert!(
        fault
            .what
            .starts_with("apiVersion, kind: one of them is missing"),
        "{}",
        fault.what
    );

    assert!(yaml("just text\n").is_err());
}

#[test]
fn a_field_put_aside_is_named_in_the_error() {
    let fault = json(r#"{"spec":{"ports":[{"port":"x"}]},"kind":"Service","apiVersion":"v1"}"#)
        .unwrap_err();
    assert!(
        fault.what.contains("spec.ports[0].port: invalid type"),
        "{}",
        fault.what
    );
}

#[test]
fn an_impossible_object_is_told_by_line_and_field() {
    let parsed = yaml(&SERVICE.replace("port: 80", "port: 0")).unwrap();
    let key = Key::Service(ServiceName::new("default", "web"));
    assert_eq!(parsed.objects[&key], Err(Effect::Refused));
    let expected = Fault {
        line: Some(9),
        what: "Service default/web: spec.ports[0].port: 0 is not a port (1-65535); the object is refused, its last good version stays in use".into(),
    };
    assert_eq!(parsed.faults, [expected]);
}

#[test]
fn a_network_of_services_that_is_none_is_told_and_the_others_are_used() {
    let text = "apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata:
  name: kubernetes
spec:
  cidrs:
  - 10.96.0.0/16
  - services
";
    let parsed = yaml(text).unwrap();
    let fault = &parsed.faults[0];
    let expected = "ServiceCIDR kubernetes: spec.cidrs[1]: \"services\" is not a CIDR; left out, the rest is used";
    assert_eq!((fault.line, fault.what.as_str()), (Some(8), expected));
    let cidrs = parsed.objects.values().flatten();
    let networks = cidrs
        .filter_map(Value::service_cidr)
        .map(|cidr| cidr.networks.len());
    assert_eq!(networks.collect::<Vec<_>>(), [1]);
}

#[test]
fn a_service_without_cluster_ip_is_told_and_skipped() {
    let parsed = yaml(&SERVICE.replace("  clusterIP: 10.96.0.1\n", "")).unwrap();
    let key = Key::Service(ServiceName::new("default", "web"));
    assert_eq!(parsed.objects[&key], Err(Effect::Skipped));
    assert_eq!(parsed.faults[0].line, Some(6), "{:?}", parsed.faults);
    assert!(
        parsed.faults[0].what.contains("spec.clusterIP: is missing"),
        "{:?}",
        parsed.faults
    );
}

#[test]
fn the_second_of_two_same_objects_in_a_file_is_told_and_ignored() {
    let parsed = yaml(&format!("{SERVICE}---\n{}", SERVICE.replace("80", "81"))).unwrap();
    let first = yaml(SERVICE).unwrap();
    assert_eq!(parsed.objects, first.objects);
    assert_eq!(parsed.faults[0].line, Some(14));
    assert!(
        parsed.faults[0].what.contains("twice"),
        "{:?}",
        parsed.faults
    );
}

#[test]
fn a_name_of_a_megabyte_is_refused_without_repeating_it() {
    let parsed = yaml(&SERVICE.replace("web", &"x".repeat(1 << 20))).unwrap();
    assert!(parsed.objects.is_empty() && parsed.has_nameless);
    assert!(
        parsed.faults[0].what.len() < 500,
        "{}",
        parsed.faults[0].what
    );
    assert!(
        parsed.faults[0]
            .what
            .contains("longer than the 63 bytes that DNS allows")
    );
}
