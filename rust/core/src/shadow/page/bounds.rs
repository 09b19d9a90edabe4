//! Whether the shadow pages of a state that was read can be followed.

use super::{Arena, BUCKETS, NONE, bits, bucket};
use crate::config::MAX_QUOTA;
use crate::error::InvariantError;
use crate::types::{ENTRIES, PageId};

impl Arena {
    /// Refuses links to pages that are not there, or that do not lead back, and levels that no table has.
    pub(crate) fn check_bounds(&self) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        let count = self.pages.len();
        let rooms = [self.sptes.len(), self.shadowed.len()];
        // Twice the quota: pages that are zapped and still roots are beyond it.
        let sized = count as u64 <= 2 * MAX_QUOTA && self.unlinks.len() == count && self.buckets.len() == BUCKETS;
        let room = rooms == [count * ENTRIES; 2];
        unless(sized && room, "as many shadow pages as entries there are not")?;
        let is_link = |at: &u32| *at == NONE || (*at as usize) < count;
        let ends = [self.newest, self.oldest];
        let links = self.pages.iter().flat_map(|page| page.hash.iter().chain(&page.list));
        let linked = links.chain(&self.buckets).chain(&ends).all(is_link);
        unless(linked, "a link to a shadow page that is not there")?;
        let mut free: Vec<_> = self.free.iter().map(|id| id.0).collect();
        free.sort_unstable();
        let once = free.windows(2).all(|pair| pair[0] < pair[1]);
        unless(
            once && free.last().is_none_or(|last| (*last as usize) < count),
            "free shadow pages that are not there",
        )?;
        self.live().into_iter().try_for_each(|id| self.check_page(id))
    }

    fn check_page(&self, id: PageId) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        let page = &self[id];
        let level = page.level().0;
        unless((1..=5).contains(&level) && page.gfn.0 >> 40 == 0, "a shadow page of an impossible level or frame")?;
        let follows = |at: u32, link: fn(&super::Page) -> u32| at == NONE || link(&self.pages[at as usize]) == id.0;
        let [newer, older] = page.hash;
        let first = newer != NONE || self.buckets[bucket(page.gfn)] == id.0;
        unless(first && follows(newer, |p| p.hash[1]) && follows(older, |p| p.hash[0]), "a hash chain that is torn")?;
        let [newer, older] = page.list;
        unless(follows(newer, |p| p.list[1]) && follows(older, |p| p.list[0]), "an active list that is torn")?;
        let mut tables = bits(&page.used).map(|index| self.spte(id.entry(index))).filter(|spte| spte.is_table(level));
        unless(tables.all(|spte| (spte.child().0 as usize) < self.pages.len()), "an entry that points to no table")
    }
}
