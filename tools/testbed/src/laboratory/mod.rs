//! The laboratory of `cargo xtask up`: it keeps the system running, and breaks parts of it when the
//! console asks for that, over a control port on loopback.
//!
//! Orders about processes and components go to [`run`], which alone owns the system. The port
//! itself sets the behaviour of the mail server and writes faulty records.

mod orders;
mod port;
mod records;

use anyhow::Result;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;

use crate::system::{CHECK_INTERVAL, Component, Condition, System};

pub use port::{Control, Parts};
pub use records::Records;

use orders::{Act, Order, Target};

/// Orders that wait. A stop of Kafka takes seconds, and a visitor may click again.
const WAITING_ORDERS: usize = 8;

/// An order with the place for its answer.
struct Request {
    order: Order,
    answer: oneshot::Sender<Result<String>>,
}

/// The orders that the control port receives.
pub struct Orders {
    requests: mpsc::Receiver<Request>,
    states: watch::Sender<State>,
}

/// What runs. The console shows it.
#[derive(Clone, Debug, Default, Serialize)]
struct State {
    processes: Vec<ProcessState>,
    components: Vec<ComponentState>,
}

#[derive(Clone, Debug, Serialize)]
struct ProcessState {
    service: &'static str,
    name: String,
    admin: u16,
    /// Whether an order has started it.
    is_further: bool,
    condition: Condition,
}

#[derive(Clone, Debug, Serialize)]
struct ComponentState {
    name: &'static str,
    condition: Condition,
}

impl State {
    fn of(system: &System) -> Self {
        let processes = system.processes().map(|(running, condition)| ProcessState {
            service: running.instance.service.name,
            name: running.name.clone(),
            admin: running.instance.admin,
            is_further: running.name != running.instance.service.name,
            condition,
        });
        let component =
            |component: Component| ComponentState { name: component.name(), condition: system.component(component) };
        Self { processes: processes.collect(), components: Component::ALL.map(component).into() }
    }
}

/// Restarts processes that end by themselves, and executes the orders. Returns only if a process
/// cannot be restarted. If an order fails, its sender gets the error, and the loop continues.
pub async fn run(system: &mut System, orders: &mut Orders) -> Result<()> {
    loop {
        orders.states.send_replace(State::of(system));
        tokio::select! {
            () = sleep(CHECK_INTERVAL) => system.restart_ended().await?,
            Some(request) = orders.requests.recv() => {
                let done = obey(system, request.order).await;
                orders.states.send_replace(State::of(system));
                // The visitor may have closed the page.
                let _ = request.answer.send(done);
            }
        }
    }
}

/// Does what an order says, and returns what was done.
async fn obey(system: &mut System, Order { act, target }: Order) -> Result<String> {
    let done = match (act, target) {
        (Act::Kill, Target::Service(service)) => {
            system.kill(service);
            format!("{} was killed", service.name)
        }
        (Act::Freeze, Target::Service(service)) => {
            system.freeze(service)?;
            format!("{} is frozen", service.name)
        }
        (Act::Resume, Target::Service(service)) => {
            system.resume(service)?;
            format!("{} continues", service.name)
        }
        (Act::Restart, Target::Service(service)) => {
            system.restart(service).await?;
            format!("{} starts", service.name)
        }
        (Act::Add, Target::Service(service)) => format!("{} starts", system.add_process(service)?),
        (Act::Remove, Target::Service(service)) => format!("{} was stopped", system.remove_process(service).await?),
        (Act::Stop, Target::Component(component)) => {
            system.stop_component(component).await;
            format!("{} is stopped", component.name())
        }
        (Act::Start, Target::Component(component)) => {
            system.start_component(component).await?;
            format!("{} starts", component.name())
        }
        (act, target) => return Err(orders::does_not_apply(act, target)),
    };
    Ok(done)
}
