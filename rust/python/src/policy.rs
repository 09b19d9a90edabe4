//! Policies written in Python: rules as data, and methods that are called for what they override.

use crate::errors;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shadowkvm_core::policy::{Asks, PageView as View, Policy, Rules, Victim, builtin};
use shadowkvm_core::types::Access;
use std::sync::{Arc, Mutex, PoisonError};

/// What a policy sees of a shadow page.
#[pyclass(frozen, module = "shadowkvm._core")]
#[derive(Clone, Copy)]
pub(crate) struct PageView(View);

#[pymethods]
impl PageView {
    /// The guest frame that the page shadows.
    #[getter]
    fn gfn(&self) -> u64 {
        self.0.gfn.0
    }

    /// Its level: 1 is a last-level table.
    #[getter]
    fn level(&self) -> u8 {
        self.0.level.0
    }

    /// The entries above it allow stores.
    #[getter]
    fn write(&self) -> bool {
        self.0.access.has(Access::W)
    }

    /// ... accesses at CPL 3.
    #[getter]
    fn user(&self) -> bool {
        self.0.access.has(Access::U)
    }

    /// ... execution.
    #[getter]
    fn execute(&self) -> bool {
        self.0.access.has(Access::X)
    }

    fn __repr__(&self) -> String {
        format!("PageView(gfn={:#x}, level={})", self.0.gfn.0, self.0.level.0)
    }
}

/// The first exception that a policy raised, until somebody raises it on.
pub(crate) type Failure = Arc<Mutex<Option<PyErr>>>;

/// A policy in Python.
#[derive(Debug)]
struct Object {
    python: Py<PyAny>,
    rules: Rules,
    asks: Asks,
    failure: Failure,
}

impl Object {
    /// Calls a method; after a failure, and for what it gives that cannot be, KVM's rule holds.
    fn ask<T: for<'a, 'py> FromPyObject<'a, 'py, Error = PyErr>>(&self, method: &str, page: &View, otherwise: T) -> T {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_some() {
            return otherwise;
        }
        let answer = Python::attach(|py| self.python.bind(py).call_method1(method, (PageView(*page),))?.extract());
        answer.unwrap_or_else(|error| {
            *failure = Some(error);
            otherwise
        })
    }
}

impl Policy for Object {
    fn rules(&self) -> Rules {
        self.rules
    }

    fn asks(&self) -> Asks {
        self.asks
    }

    fn may_unsync(&mut self, page: &View) -> bool {
        self.ask("may_unsync", page, self.rules.may_unsync)
    }

    fn flood_threshold(&mut self, page: &View) -> u32 {
        match self.ask("flood_threshold", page, self.rules.flood_threshold) {
            0 => u32::MAX,
            n => n,
        }
    }

    fn prefetch(&mut self, page: &View) -> usize {
        self.ask("prefetch", page, self.rules.prefetch)
    }

    fn copy(&self) -> Box<dyn Policy> {
        let python = Python::attach(|py| self.python.clone_ref(py));
        Box::new(Self { python, rules: self.rules, asks: self.asks, failure: self.failure.clone() })
    }

    fn failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// What decides beside a built-in policy: the object, the methods that are asked, the rules that are otherwise.
pub(crate) type Decider = (Py<PyAny>, Vec<String>, Py<PyDict>);

/// A policy as Python describes it, kept to make it anew elsewhere.
pub(crate) struct Source {
    pub(crate) base: String,
    pub(crate) decider: Option<Decider>,
}

impl Source {
    /// The policy, and where it leaves its exception if it is one in Python.
    pub(crate) fn make(&self, py: Python<'_>) -> PyResult<(Box<dyn Policy>, Option<Failure>)> {
        match &self.decider {
            Some((object, asks, rules)) => {
                let (policy, failure) = from_python(object.clone_ref(py), &self.base, asks, rules.bind(py))?;
                Ok((policy, Some(failure)))
            }
            None => Ok((builtin(&self.base).map_err(errors::config)?, None)),
        }
    }
}

/// The policy that a Python object describes: `base` names the built-in one that holds where it says nothing, `asks` the
/// methods that are to be called, `rules` the rules that are otherwise.
fn from_python(
    object: Py<PyAny>,
    base: &str,
    asks: &[String],
    rules: &Bound<'_, PyDict>,
) -> PyResult<(Box<dyn Policy>, Failure)> {
    let failure = Failure::default();
    let has = |name: &str| asks.iter().any(|asked| asked == name);
    let asks =
        Asks { may_unsync: has("may_unsync"), flood_threshold: has("flood_threshold"), prefetch: has("prefetch") };
    let rules = overridden(builtin(base).map_err(errors::config)?.rules(), rules)?;
    Ok((Box::new(Object { python: object, rules, asks, failure: failure.clone() }), failure))
}

fn overridden(mut rules: Rules, with: &Bound<'_, PyDict>) -> PyResult<Rules> {
    for (name, value) in with {
        match name.extract::<String>()?.as_str() {
            "large_pages" => rules.large_pages = value.extract()?,
            "sync_all" => rules.sync_all = value.extract()?,
            "invlpg_protects" => rules.invlpg_protects = value.extract()?,
            "update_on_write" => rules.update_on_write = value.extract()?,
            "unsync_limit" => match value.extract::<u32>() {
                Ok(limit) if limit > 0 => rules.unsync_limit = Some(limit),
                _ => return Err(errors::refused(format!("unsync_limit {value}: a number from 1 on is expected"))),
            },
            "victim" => {
                rules.victim = match value.extract::<String>()?.as_str() {
                    "oldest" => Victim::Oldest,
                    "newest" => Victim::Newest,
                    "emptiest" => Victim::Emptiest,
                    other => {
                        return Err(errors::refused(format!(
                            "victim {other:?} is not known; choose oldest, newest or emptiest"
                        )));
                    }
                }
            }
            other => return Err(errors::refused(format!("{other}: there is no such rule"))),
        }
    }
    Ok(rules)
}

/// Raises what a policy raised, if it did.
pub(crate) fn raise(py: Python<'_>, failure: Option<&Failure>) -> PyResult<()> {
    let raised = failure.and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
    raised.map_or(Ok(()), |cause| Err(errors::policy(py, cause)))
}
