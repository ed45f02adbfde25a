//! Calls of several tasks that are made together. While one batch is in progress, further calls
//! wait, and the next batch has all of them. So under load they share the cost of a batch, and a
//! call that comes alone is made at once.

use tokio::sync::{mpsc, oneshot};

/// Makes calls. Clones share the batches.
pub struct Caller<T, R> {
    queue: mpsc::Sender<Call<T, R>>,
}

/// The calls that wait, for the task that makes them.
pub struct Calls<T, R> {
    queue: mpsc::Receiver<Call<T, R>>,
    batch_size: usize,
}

/// The callers of a batch.
pub struct Answers<R>(Vec<oneshot::Sender<R>>);

struct Call<T, R> {
    item: T,
    answer: oneshot::Sender<R>,
}

/// A batch has at most `batch_size` calls. As many more wait in the queue; further callers wait for
/// a place in it.
pub fn batching<T, R>(batch_size: usize) -> (Caller<T, R>, Calls<T, R>) {
    let (sender, receiver) = mpsc::channel(batch_size);
    (Caller { queue: sender }, Calls { queue: receiver, batch_size })
}

impl<T, R> Caller<T, R> {
    /// Makes a call and waits for its answer. A caller that gives up takes the call back only if no
    /// batch has it yet. `None`: the task that makes the calls has ended.
    pub async fn call(&self, item: T) -> Option<R> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(Call { item, answer }).await.ok()?;
        answered.await.ok()
    }
}

impl<T, R> Clone for Caller<T, R> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<T, R> Calls<T, R> {
    /// Waits for a call, and takes all that wait. `None`: every [`Caller`] was dropped.
    ///
    /// Before it takes them, it lets the tasks run that are ready: they may be about to call too.
    pub async fn next(&mut self) -> Option<(Vec<T>, Answers<R>)> {
        let mut calls = vec![];
        while calls.is_empty() {
            if self.queue.recv_many(&mut calls, self.batch_size).await == 0 {
                return None;
            }
            tokio::task::yield_now().await;
            while calls.len() < self.batch_size
                && let Ok(call) = self.queue.try_recv()
            {
                calls.push(call);
            }
            calls.retain(|call| !call.answer.is_closed());
        }
        let (items, answers) = calls.into_iter().map(|call| (call.item, call.answer)).unzip();
        Some((items, Answers(answers)))
    }
}

impl<R> Answers<R> {
    /// Answers the calls of the batch, in its order.
    pub fn send(self, answers: impl IntoIterator<Item = R>) {
        for (caller, answer) in self.0.into_iter().zip(answers) {
            let _ = caller.send(answer); // a caller that has given up needs no answer
        }
    }

    /// Gives every call of the batch the same answer.
    pub fn send_to_all(self, answer: impl FnMut() -> R) {
        self.send(std::iter::repeat_with(answer));
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::future::join_all;

    use super::*;

    #[tokio::test]
    async fn calls_that_wait_are_made_together_and_each_gets_its_own_answer() {
        let (caller, mut calls) = batching(3);
        let callers = join_all((0..5).map(|number| caller.call(number)));
        let mut sizes = vec![];
        let worker = async {
            for _ in 0..2 {
                let (items, answers) = calls.next().await.unwrap();
                sizes.push(items.len());
                answers.send(items.iter().map(|number| number * 10));
            }
        };
        let (answers, ()) = tokio::join!(callers, worker);
        assert_eq!(answers, [Some(0), Some(10), Some(20), Some(30), Some(40)]);
        assert_eq!(sizes, [3, 2]);
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_takes_its_call_back() {
        let (caller, mut calls) = batching(3);
        assert!(caller.call(1).now_or_never().is_none());
        let worker = async {
            let (items, answers) = calls.next().await.unwrap();
            answers.send_to_all(|| items.len());
        };
        let (answer, ()) = tokio::join!(caller.call(2), worker);
        assert_eq!(answer, Some(1), "calls in the batch");
        drop(caller);
        assert!(calls.next().await.is_none());
    }
}
