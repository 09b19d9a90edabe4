//! Walks through images of physical memory: arrays in, arrays out, the GIL released.

use crate::buffer::{slice, slice_mut};
use crate::errors;
use crate::number::word;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use shadowkvm_core::image::{Block, Image, Rules, Segment, Viewer as Core};
use shadowkvm_core::types::{AccessKind, Gva};

/// One step of a walk: level, table, index, entry, rights.
type StepTuple = (u8, u64, usize, Option<u64>, u8);

/// Who looks: paging mode and rules.
#[pyclass(frozen, module = "shadowkvm._core")]
pub(crate) struct Viewer(Core);

#[pymethods]
impl Viewer {
    #[new]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "they are keywords in Python")]
    #[pyo3(signature = (mode, *, access="read", user=false, wp=true, nx=true, smep=false, smap=false, maxphyaddr=52))]
    fn new(
        mode: &str,
        access: &str,
        user: bool,
        wp: bool,
        nx: bool,
        smep: bool,
        smap: bool,
        maxphyaddr: u32,
    ) -> PyResult<Self> {
        let kind = match access {
            "read" => AccessKind::Read,
            "write" => AccessKind::Write,
            "execute" => AccessKind::Fetch,
            _ => return Err(errors::refused(format!("access {access:?} is not known; choose read, write or execute"))),
        };
        let rules = Rules { kind, user, wp, nx, smep, smap, maxphyaddr };
        Core::new(mode, &rules).map(Self).map_err(errors::config)
    }

    /// One address: its steps, then gpa, level, flags and fault.
    #[allow(clippy::needless_pass_by_value, reason = "the form that PyO3 takes")]
    fn walk(
        &self,
        segments: Vec<(u64, PyBuffer<u8>)>,
        #[pyo3(from_py_with = word)] cr3: u64,
        #[pyo3(from_py_with = word)] gva: u64,
    ) -> PyResult<(Vec<StepTuple>, u64, u8, u8, u8)> {
        let image = image(&segments)?;
        let mut steps = Vec::new();
        let found = self.0.walk(&image, cr3, Gva(gva), |step| {
            steps.push((step.level, step.table, step.index, step.entry, step.granted.0));
        });
        Ok((steps, found.gpa, found.level, found.flags, found.fault as u8))
    }

    /// Many addresses, by `threads` threads; what is found goes to the four arrays, which are nobody else's.
    #[allow(clippy::too_many_arguments, reason = "four arrays that belong together, but are four in Python")]
    #[allow(clippy::needless_pass_by_value, reason = "the form that PyO3 takes")]
    fn translate(
        &self,
        py: Python<'_>,
        segments: Vec<(u64, PyBuffer<u8>)>,
        #[pyo3(from_py_with = word)] cr3: u64,
        gvas: PyBuffer<u64>,
        gpa: PyBuffer<u64>,
        level: PyBuffer<u8>,
        flags: PyBuffer<u8>,
        fault: PyBuffer<u8>,
        threads: usize,
    ) -> PyResult<()> {
        let count = gvas.item_count();
        if [gpa.item_count(), level.item_count(), flags.item_count(), fault.item_count()] != [count; 4] {
            return Err(errors::refused(format!("translate: the arrays differ in length from the {count} addresses")));
        }
        let (image, gvas) = (image(&segments)?, slice(&gvas)?);
        let (gpa, level, flags, fault) = (slice_mut(&gpa)?, slice_mut(&level)?, slice_mut(&flags)?, slice_mut(&fault)?);
        let block = Block { gvas, gpa, level, flags, fault };
        let (viewer, image) = (&self.0, &image);
        py.detach(|| {
            if threads <= 1 {
                return viewer.translate(image, cr3, block);
            }
            std::thread::scope(|scope| {
                for part in block.parts(count.div_ceil(threads).max(1)) {
                    scope.spawn(move || viewer.translate(image, cr3, part));
                }
            });
        });
        Ok(())
    }
}

fn image(segments: &[(u64, PyBuffer<u8>)]) -> PyResult<Image<'_>> {
    let segments: PyResult<Vec<_>> =
        segments.iter().map(|(base, buffer)| Ok(Segment { base: *base, bytes: slice(buffer)? })).collect();
    Image::new(segments?).map_err(errors::config)
}
