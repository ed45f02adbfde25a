//! Settings: every number has a range, and every secret comes from the environment.

use std::collections::BTreeMap;

use crate::tree::{code, read, sources};

const NUMBERS: [&str; 11] = ["u8", "u16", "u32", "u64", "usize", "i16", "i32", "i64", "isize", "f32", "f64"];

/// An argument of a service's program: its name, its type, and its attribute.
#[derive(Debug, PartialEq)]
struct Argument {
    name: String,
    kind: String,
    attribute: String,
}

/// The fields that have an `#[arg(…)]`.
fn arguments(text: &str) -> Vec<Argument> {
    let mut found = vec![];
    let mut attribute = None;
    for line in code(text).map(str::trim) {
        if line.starts_with("#[arg(") {
            attribute = Some(line.to_owned());
        } else if let Some(open) = attribute.as_mut().filter(|attribute| !attribute.ends_with(")]")) {
            open.push_str(line);
        } else if let Some(attribute) = attribute.take() {
            let (name, kind) = line.trim_end_matches(',').split_once(": ").unwrap_or((line, ""));
            let kind = kind.trim_start_matches("Option<").trim_start_matches("Vec<").trim_end_matches('>');
            let name = name.trim_start_matches("pub ").to_owned();
            found.push(Argument { name, kind: kind.to_owned(), attribute });
        }
    }
    found
}

#[test]
fn every_number_among_the_settings_has_a_range_that_its_error_names() {
    let mut numbers = 0;
    let mut without = vec![];
    for (path, text) in sources() {
        for argument in arguments(&text).into_iter().filter(|argument| NUMBERS.contains(&&*argument.kind)) {
            numbers += 1;
            let typed = format!("value_parser = number::<{}>(", argument.kind);
            let has_range = argument.attribute.contains(&typed) || argument.attribute.contains("value_parser = share");
            without.extend((!has_range).then(|| format!("{path}: {}", argument.name)));
        }
    }
    assert!(numbers >= 15, "only {numbers} numbers were found: the rule checks nothing");
    assert!(without.is_empty(), "numbers without `value_parser = number::<TYPE>(RANGE)`:\n{}", without.join("\n"));
}

/// A secret is a `Secret<…>`, which has no flag. The names tell what is secret.
#[test]
fn no_secret_has_a_flag() {
    for (path, text) in sources() {
        for Argument { name, .. } in arguments(&text) {
            let secret = ["password", "secret", "token", "database_url", "valkey_url"];
            let is_secret = secret.iter().any(|word| name.contains(word));
            assert!(!is_secret, "{path}: {name} has a flag, which `ps` shows: make it a `Secret`");
        }
    }
}

/// An empty variable counts as unset, for every setting of every service.
#[test]
fn every_service_reads_its_settings_in_the_same_way() {
    for service in topology::SERVICES {
        let main = read(&format!("services/{}/src/main.rs", service.name));
        let parses = main.contains("= settings::parse();") && !main.contains("Cli::parse()");
        assert!(parses, "services/{}/src/main.rs does not use `settings::parse`", service.name);
    }
}

/// The supervisor of the containers waits longer than a service takes to stop.
#[test]
fn the_grace_period_of_the_compose_file_is_longer_than_a_stop_takes() {
    let config = read("shared/src/service/config.rs");
    let defaults: BTreeMap<String, u64> = arguments(&config)
        .into_iter()
        .filter_map(|Argument { name, attribute, .. }| {
            let (_, default) = attribute.split_once("default_value_t = ")?;
            Some((name, default.split([',', ')']).next()?.replace('_', "").parse().ok()?))
        })
        .collect();
    let stop = defaults["drain_ms"] + defaults["shutdown_ms"];
    let compose = read("docker-compose.yml");
    let (_, period) = compose.split_once("stop_grace_period: ").unwrap();
    let seconds: u64 = period.split('s').next().unwrap().parse().unwrap();
    assert!(1_000 * seconds >= stop + 2_000, "stop_grace_period is {seconds} s, DRAIN_MS and SHUTDOWN_MS {stop} ms");
}

#[test]
fn arguments_are_read_with_their_type_and_their_attribute() {
    let text = "
struct Config {
    /// Text.
    #[arg(long, env, default_value_t = 2)]
    pub senders: u16,
    #[arg(
        long,
        value_parser = number::<u32>(1..=2)
    )]
    hours: Option<u32>,
    #[command(flatten)]
    kafka: KafkaConfig,
}
";
    let argument = |name: &str, kind: &str, attribute: &str| Argument {
        name: name.to_owned(),
        kind: kind.to_owned(),
        attribute: attribute.to_owned(),
    };
    let expected = [
        argument("senders", "u16", "#[arg(long, env, default_value_t = 2)]"),
        argument("hours", "u32", "#[arg(long,value_parser = number::<u32>(1..=2))]"),
    ];
    assert_eq!(arguments(text), expected);
}
