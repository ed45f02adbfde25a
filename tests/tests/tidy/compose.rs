//! What the containers of the compose files may do.

use serde_yaml_ng::{Mapping, Value};

use crate::tree::{files, read, root};

/// Settings that give a container more rights.
const RIGHTS: [&str; 7] = ["privileged", "cap_add", "devices", "pid", "ipc", "userns_mode", "device_cgroup_rules"];

/// The compose files with their services.
fn compose_files() -> Vec<(String, Mapping)> {
    let at_the_root = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name());
    let at_the_root = at_the_root.filter_map(|name| name.into_string().ok());
    let names = files("deploy", "ml").into_keys().chain(at_the_root);
    let mut found = vec![];
    for path in names.filter(|name| name.ends_with(".yml") || name.ends_with(".yaml")) {
        if let Some(services) = services(&read(&path)) {
            found.push((path, services));
        }
    }
    found
}

/// The services of a compose file, with what `<<` merges into them.
fn services(text: &str) -> Option<Mapping> {
    let mut file: Value = serde_yaml_ng::from_str(text).unwrap();
    // One call merges one level, and x-migrate merges x-service.
    for _ in 0..2 {
        file.apply_merge().unwrap();
    }
    file.get("services")?.as_mapping().cloned()
}

fn list(service: &Value, key: &str) -> Vec<String> {
    let value = match service.get(key) {
        Some(Value::Tagged(tagged)) => &tagged.value, // !override
        Some(value) => value,
        None => return vec![],
    };
    value.as_sequence().unwrap().iter().map(|entry| entry.as_str().unwrap().to_owned()).collect()
}

/// Why this service, which we build, could write to its files or gain rights.
fn faults_of_ours(service: &Value) -> Vec<&'static str> {
    let mut faults = vec![];
    if service.get("read_only") != Some(&Value::Bool(true)) {
        faults.push("its files are not read-only");
    }
    if list(service, "cap_drop") != ["ALL"] {
        faults.push("it keeps capabilities");
    }
    if !list(service, "security_opt").contains(&"no-new-privileges:true".to_owned()) {
        faults.push("it may gain privileges");
    }
    if service.get("volumes").is_some() || service.get("tmpfs").is_some() {
        faults.push("it has writable files");
    }
    faults
}

/// Why this container has rights that none of ours needs.
fn faults_of_any(service: &Value) -> Vec<String> {
    let mut faults: Vec<String> =
        RIGHTS.iter().filter(|right| service.get(**right).is_some()).map(|right| (*right).to_owned()).collect();
    // Neither no network nor that of another container is a further right.
    let network = service.get("network_mode").and_then(Value::as_str);
    let network = network.filter(|mode| *mode != "none" && !mode.starts_with("service:"));
    faults.extend(network.map(|mode| format!("network {mode}")));
    let user = service.get("user").map(|user| user.as_str().map_or_else(|| format!("{user:?}"), str::to_owned));
    faults.extend(user.filter(|user| user.starts_with("root") || user.starts_with('0')));
    faults.extend(list(service, "ports").into_iter().filter(|port| !port.starts_with("127.0.0.1:")));
    faults
}

/// Every service that we build runs read-only, without capabilities, and cannot gain privileges.
#[test]
fn our_containers_have_no_rights_and_no_writable_files() {
    let compose = services(&read("docker-compose.yml")).unwrap();
    let ours: Vec<(&Value, &Value)> = compose.iter().filter(|(_, service)| service.get("build").is_some()).collect();
    assert!(ours.len() >= topology::SERVICES.len(), "only {} services are built: the rule checks nothing", ours.len());
    for (name, service) in ours {
        assert_eq!(faults_of_ours(service), [""; 0], "docker-compose.yml, {name:?}");
    }
    let secured = services(&read("compose.secure.yaml")).unwrap();
    let is_program = |name: &Value| name.as_str().is_some_and(|name| name.ends_with("-topics"));
    let programs: Vec<(&Value, &Value)> = secured.iter().filter(|(name, _)| is_program(name)).collect();
    assert_eq!(programs.len(), topology::SERVICES.len(), "containers that create the topics of a service");
    for (name, service) in programs {
        assert_eq!(faults_of_ours(service), [""; 0], "compose.secure.yaml, {name:?}");
    }
}

/// No container of any compose file has further rights, and every port is bound to loopback. A file
/// that is added to docker-compose.yml does not take back what that one restricts.
#[test]
fn no_compose_file_gives_a_container_more_rights() {
    let restrictions = ["read_only", "cap_drop", "security_opt", "user"];
    let found = compose_files();
    assert!(found.len() >= 2, "the compose files were not found: the rule checks nothing");
    for (path, services) in found {
        for (name, service) in services {
            assert_eq!(faults_of_any(&service), [""; 0], "{path}, {name:?}");
            if path != "docker-compose.yml" && topology::SERVICES.iter().any(|ours| Some(ours.name) == name.as_str()) {
                let changed = restrictions.iter().find(|key| service.get(**key).is_some());
                assert_eq!(changed, None, "{path}, {name:?}: only docker-compose.yml decides this");
            }
        }
    }
}

/// The containers that `docker compose up` starts may use less than 2 GB together. Those of the
/// profile come on top, and each of them has a limit too.
#[test]
fn the_containers_have_limits_and_the_usual_ones_stay_below_two_gigabytes() {
    let compose = services(&read("docker-compose.yml")).unwrap();
    let mut usual = 0;
    let mut observing = vec![];
    for (name, service) in &compose {
        let name = name.as_str().unwrap();
        let limit =
            service.get("mem_limit").and_then(Value::as_str).unwrap_or_else(|| panic!("{name} has no mem_limit"));
        let limit: u64 = limit.strip_suffix('m').unwrap().parse().unwrap();
        if service.get("profiles").is_some() {
            observing.push(name);
        } else if !name.ends_with("-migrate") {
            // A migration has ended when its service starts.
            usual += limit;
        }
    }
    assert!(usual < 2048, "the usual containers may use {usual} MB");
    observing.sort_unstable();
    assert_eq!(observing, ["grafana", "jaeger", "kafka-ui", "prometheus"]);
}

/// The image has an unprivileged user, by number: a container platform can check that it is not
/// root.
#[test]
fn our_image_runs_as_an_unprivileged_user() {
    let dockerfile = read("Dockerfile");
    let (_, last_stage) = dockerfile.rsplit_once("\nFROM ").unwrap();
    let users: Vec<&str> = last_stage.lines().filter_map(|line| line.strip_prefix("USER ")).collect();
    assert_eq!(users, ["65532:65532"], "the user of the last stage");
}

#[test]
fn faults_of_a_compose_file_are_found() {
    let text = "
x-safe: &safe { read_only: true, cap_drop: [ALL], security_opt: ['no-new-privileges:true'] }
services:
  safe: { <<: *safe, ports: ['127.0.0.1:1:1'] }
  writes: { <<: *safe, read_only: false, volumes: ['a:/a'] }
  gains: { read_only: true, cap_drop: [NET_RAW] }
  rules: { <<: *safe, privileged: true, user: '0:0', ports: ['8080:8080'], network_mode: host }
  alone: { <<: *safe, network_mode: none }
";
    let services = services(text).unwrap();
    assert_eq!(faults_of_ours(&services["safe"]), [""; 0]);
    assert_eq!(faults_of_any(&services["safe"]), [""; 0]);
    assert_eq!(faults_of_ours(&services["writes"]), ["its files are not read-only", "it has writable files"]);
    assert_eq!(faults_of_ours(&services["gains"]), ["it keeps capabilities", "it may gain privileges"]);
    assert_eq!(faults_of_any(&services["rules"]), ["privileged", "network host", "0:0", "8080:8080"]);
    assert_eq!(faults_of_any(&services["alone"]), [""; 0]);
}
