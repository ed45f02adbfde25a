//! What happened to the processes in this run: which were started, and which ended by themselves.

use std::sync::atomic::Ordering;

use topology::{SERVICES, Service};

use super::Processes;

impl Processes {
    /// The services that were started, whether they run now or not.
    pub fn started(&self) -> impl Iterator<Item = Service> {
        SERVICES.into_iter().filter(|service| self.was_started(*service))
    }

    pub fn was_started(&self, service: Service) -> bool {
        self.starts.contains_key(service.name)
    }

    /// The services that should be running now.
    pub fn should_run(&self) -> impl Iterator<Item = Service> {
        self.started().filter(|service| !self.stopped.contains(service.name))
    }

    /// Whether one process of the service has run from its start until now, and no service ever had
    /// a second process.
    pub fn has_run_alone(&self, service: Service) -> bool {
        let once = self.starts.get(service.name) == Some(&1) && !self.stopped.contains(service.name);
        once && !self.had_copies.load(Ordering::Relaxed)
    }

    /// The processes that ended though the test did not end them, with their exit status.
    pub fn ended_by_themselves(&mut self) -> Vec<String> {
        let mut ended = self.ended.clone();
        for (name, process) in &mut self.running {
            if !self.stopped.contains(name)
                && let Some(status) = process.exit_status()
            {
                ended.push(format!("{name}: {status}"));
            }
        }
        ended
    }

    /// Removes the process of a service that is started again, and notes if it had ended by itself.
    pub(super) fn note_replaced(&mut self, service: Service) {
        let name = service.name;
        if let Some(mut process) = self.running.remove(name)
            && !self.expected_to_end.contains(name)
            && !self.stopped.contains(name)
            && let Some(status) = process.exit_status()
        {
            self.ended.push(format!("{name}: {status}"));
        }
    }
}
