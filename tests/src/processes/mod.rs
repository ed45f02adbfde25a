//! The facet `processes`: the services' processes, which a test starts, kills, freezes and
//! observes.

mod admin;
mod logs;
mod metrics;
mod run;
mod service_process;
mod subcommands;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use testbed::process::Logs;
use topology::{SERVICES, Service};
use uuid::Uuid;

pub use metrics::OUTCOMES;
pub use service_process::{Addresses, ServiceProcess, is_frozen};

/// The variables with which every service is started, and the first process of each service. A
/// service is started with the same ports each time.
pub struct Processes {
    environment: Vec<(String, String)>,
    /// Further variables of single services, by the service's name.
    own_environment: BTreeMap<&'static str, Vec<(String, String)>>,
    addresses: Addresses,
    running: BTreeMap<&'static str, ServiceProcess>,
    logs: Logs,
    copies_logs: Mutex<Vec<Logs>>,
    /// Number of starts per service.
    starts: BTreeMap<&'static str, usize>,
    /// Services that were killed or stopped, and not started again.
    stopped: BTreeSet<&'static str>,
    /// Services that were started with a fault point, which may end them.
    expected_to_end: BTreeSet<&'static str>,
    /// Processes that ended by themselves and were replaced.
    ended: Vec<String>,
    /// Whether any service ever had a second process at the same time.
    had_copies: AtomicBool,
}

impl Processes {
    pub(crate) fn new(environment: Vec<(String, String)>, logs: Logs) -> Self {
        Self {
            environment,
            own_environment: BTreeMap::new(),
            addresses: Addresses::on_free_ports(),
            running: BTreeMap::new(),
            logs,
            copies_logs: Mutex::default(),
            starts: BTreeMap::new(),
            stopped: BTreeSet::new(),
            expected_to_end: BTreeSet::new(),
            ended: vec![],
            had_copies: AtomicBool::new(false),
        }
    }

    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// The variables with which the console finds this system, and where it logs.
    pub(crate) fn for_console(&self) -> (Vec<(String, String)>, &Logs) {
        let mut environment = self.environment.clone();
        environment.extend(self.addresses.for_console());
        (environment, &self.logs)
    }

    /// The variables with which every service is started, and where it logs.
    pub fn environment(&self) -> (&[(String, String)], &Logs) {
        (&self.environment, &self.logs)
    }

    /// Sets a variable for every service that is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Sets variables for every service that is started from now on.
    pub fn set_all(&mut self, settings: &[(&str, &str)]) {
        for (name, value) in settings {
            self.set(name, value);
        }
    }

    /// Sets variables for one service. They precede those of all services.
    pub fn set_own(&mut self, service: Service, settings: &[(&str, String)]) {
        let own = self.own_environment.entry(service.name).or_default();
        own.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    }

    pub fn is_set(&self, name: &str) -> bool {
        self.environment.iter().any(|(known, _)| known == name)
    }

    pub fn setting(&self, name: &str) -> &str {
        let (_, value) = self.environment.iter().find(|(known, _)| known == name).unwrap();
        value
    }

    /// Starts a service without waiting until it is ready. If it runs, it is killed first.
    pub fn spawn(&mut self, service: Service) {
        self.spawn_with(service, &[]);
    }

    /// As [`Processes::spawn`], with further variables such as `FAULT_AT`.
    pub fn spawn_with(&mut self, service: Service, settings: &[(&str, &str)]) {
        let name = service.name;
        self.note_replaced(service);
        let process =
            ServiceProcess::spawn(service, &self.addresses, &self.environment_of(service, settings), &self.logs);
        self.running.insert(name, process);
        *self.starts.entry(name).or_default() += 1;
        self.stopped.remove(name);
        self.expected_to_end.remove(name);
        if settings.iter().any(|(name, _)| *name == "FAULT_AT") {
            self.expected_to_end.insert(name);
        }
    }

    /// Starts services, or starts them again, and waits until all are ready.
    pub async fn start(&mut self, services: &[Service]) {
        for service in services {
            self.spawn(*service);
        }
        self.until_ready(services).await;
    }

    /// Starts a service, or starts it again, with further variables, and waits until it is ready.
    pub async fn start_with(&mut self, service: Service, settings: &[(&str, &str)]) {
        self.spawn_with(service, settings);
        self.until_ready(&[service]).await;
    }

    /// Starts all services and waits until they are ready.
    pub async fn start_all(&mut self) {
        self.start(&SERVICES).await;
    }

    pub async fn until_ready(&mut self, services: &[Service]) {
        for service in services {
            self.process(*service).until_ready().await;
        }
    }

    /// Starts one more process of a service, on ports of its own.
    pub fn spawn_another(&self, service: Service) -> ServiceProcess {
        self.spawn_another_with(service, &[])
    }

    /// As [`Processes::spawn_another`], with further variables.
    pub fn spawn_another_with(&self, service: Service, settings: &[(&str, &str)]) -> ServiceProcess {
        self.had_copies.store(true, Ordering::Relaxed);
        let folder = self.logs.folder().file_name().unwrap().to_string_lossy();
        let logs = Logs::to_files(&format!("tests/{folder}-{}", Uuid::now_v7().simple())).unwrap();
        self.copies_logs.lock().unwrap().push(logs.clone());
        ServiceProcess::spawn(service, &Addresses::on_free_ports(), &self.environment_of(service, settings), &logs)
    }

    /// SIGKILL. The process has ended when this returns.
    pub fn kill(&mut self, service: Service) {
        self.stopped.insert(service.name);
        self.process(service).kill();
    }

    /// SIGSTOP.
    pub fn freeze(&mut self, service: Service) {
        self.process(service).freeze();
    }

    /// SIGCONT.
    pub fn thaw(&mut self, service: Service) {
        self.process(service).thaw();
    }

    /// SIGUSR1: consumers that the breaker has paused resume.
    pub fn resume_consumers(&mut self, service: Service) {
        self.process(service).resume_consumers();
    }

    /// SIGTERM, without waiting for the end.
    pub fn terminate(&mut self, service: Service) {
        self.stopped.insert(service.name);
        self.process(service).terminate();
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self, service: Service) {
        self.stopped.insert(service.name);
        self.process(service).stop().await;
    }

    /// Waits until the process has ended by itself or by a fault point. Its log is complete then.
    pub async fn until_ended(&mut self, service: Service) {
        self.process(service).until_ended().await;
    }

    /// Whether the process has ended, by itself or by a fault point.
    pub fn has_ended(&mut self, service: Service) -> bool {
        self.process(service).exit_status().is_some()
    }

    /// Waits until a fault point has frozen the process. Linux only.
    pub async fn until_frozen(&mut self, service: Service) {
        self.process(service).until_frozen().await;
    }

    pub fn pid(&mut self, service: Service) -> u32 {
        self.process(service).pid()
    }

    fn process(&mut self, service: Service) -> &mut ServiceProcess {
        let running = self.running.get_mut(service.name);
        running.unwrap_or_else(|| panic!("{} was not started", service.name))
    }

    /// Of several values of one variable the last one counts.
    fn environment_of(&self, service: Service, settings: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = self.own_environment.get(service.name).into_iter().flatten();
        let for_all = settings_of_the_run();
        let further = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        for_all.into_iter().chain(self.environment.iter().chain(own).cloned()).chain(further).collect()
    }
}

/// `WAYBILL_TEST_SETTINGS`: variables with which every service of every test is started, for
/// example `CONSUMERS=6 BATCH_RECORDS=1`. What a test sets itself takes precedence.
fn settings_of_the_run() -> Vec<(String, String)> {
    let settings = std::env::var("WAYBILL_TEST_SETTINGS").unwrap_or_default();
    let parsed = settings.split_whitespace().map(|setting| {
        let (name, value) = setting.split_once('=').expect("WAYBILL_TEST_SETTINGS is NAME=value NAME=value");
        (name.to_owned(), value.to_owned())
    });
    parsed.collect()
}
