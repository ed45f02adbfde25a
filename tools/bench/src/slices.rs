//! Runs both sides of a job in turn: ours, the limit, ours, the limit, …

use anyhow::Result;
use testbed::say::say;

use crate::bed::Bed;
use crate::meter::Slice;

/// A slice in which other programs took more cores than this is measured again.
const OTHERS_LIMIT: f64 = 0.5;
/// How often a slice is measured again.
const REPEATS: usize = 3;

/// A job with two sides.
pub trait Contest {
    /// One slice of Waybill.
    async fn ours(&mut self) -> Result<Slice>;

    /// One slice of the limit.
    async fn limit(&mut self) -> Result<Slice>;
}

/// The slices of both sides. They have the same number, and those with the same index were measured
/// one after the other.
pub struct Slices {
    pub ours: Vec<Slice>,
    pub limit: Vec<Slice>,
}

/// Measures both sides. A first slice of each, which fills caches and opens connections, does not
/// count in a full run.
pub async fn measure(bed: &Bed, contest: &mut impl Contest) -> Result<Slices> {
    let mut slices = Slices { ours: vec![], limit: vec![] };
    if bed.warms_up() {
        contest.ours().await?;
        contest.limit().await?;
    }
    for _ in 0..bed.size().slices() {
        slices.ours.push(undisturbed(bed, async || contest.ours().await).await?);
        slices.limit.push(undisturbed(bed, async || contest.limit().await).await?);
    }
    Ok(slices)
}

/// Measures a slice until other programs leave the machine to it. Gives up after some repeats.
async fn undisturbed(bed: &Bed, mut side: impl AsyncFnMut() -> Result<Slice>) -> Result<Slice> {
    let mut repeats = 0;
    loop {
        let slice = side().await?;
        let others = slice.cores_of_others();
        if others <= OTHERS_LIMIT || bed.tolerates_others() || repeats == REPEATS {
            return Ok(slice);
        }
        say(format_args!("  other programs took {others:.1} cores; measuring this slice again"));
        repeats += 1;
    }
}
