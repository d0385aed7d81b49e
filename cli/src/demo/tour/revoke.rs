//! Access that ends while it is used.

use anyhow::{Context as _, bail, ensure};
use serde_json::json;

use super::super::apps;
use super::super::clock::Moment;
use super::super::geography::Region;
use super::super::world::LEAVER;
use super::{RECOVERY_LIMIT, RETRY_EVERY, Tour, WATCH};

impl Tour {
    pub(super) async fn leaver_disabled(&mut self) -> anyhow::Result<String> {
        let leader = self.leader().await?;
        let follower = Region::ALL.into_iter().rfind(|region| *region != leader).context("there are three brokers")?;
        let mut sessions = Vec::new();
        for region in Region::ALL {
            sessions.push(self.framing(&format!("leaver-{}", region.name())).await?);
        }
        let bystander = self.framing("allowed-frankfurt").await?;
        tokio::time::sleep(WATCH).await;
        if let Some(why) = sessions.iter().find_map(|session| session.ended()) {
            bail!("a session ended before its time: {why}");
        }
        let web = self.world.broker(follower).web;
        let answered = self.world.directory.patch(web, &self.world.users[LEAVER], "active", json!(false)).await?;
        let ended = async {
            while sessions.iter().any(|session| session.ended().is_none()) {
                tokio::time::sleep(RETRY_EVERY).await;
            }
        };
        tokio::time::timeout(RECOVERY_LIMIT, ended).await.context("a session of the leaver lives on")?;
        // What is still between the ends arrives.
        tokio::time::sleep(WATCH).await;
        let last_ms = |at: Option<Moment>| at.map_or(0.0, |at| at.ms_since(answered).max(0.0));
        let revoke_ms = sessions.iter().map(|session| last_ms(session.last_payload())).fold(0.0, f64::max);
        self.figures.revoke_ms = Some(revoke_ms);
        if let Some(why) = bystander.ended() {
            bail!("a session of someone else ended too: {why}");
        }
        let again = self.nc("leaver-frankfurt", apps::CHAT, b"hello\n").await?;
        ensure!(again.code != Some(0) && again.out.is_empty(), "the leaver gets in again: {again:?}");
        Ok(format!(
            "last byte of {} sessions on three brokers {revoke_ms:.1} ms after the answer of {}",
            sessions.len(),
            follower.name()
        ))
    }
}
