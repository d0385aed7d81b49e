//! How the demo's cluster comes to be: the commands and requests that an operator and a directory would send.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::apps;
use super::geography::Region;
use super::link::Link;
use super::process::Process;
use super::web::Caller;
use super::world::{ALLOWED, BILLING, CONNECTORS, Connector, DENIED, LEAVER, Seat, TRUST_DOMAIN, World};

/// Longest wait for the first answer of an application through the tunnel.
const FIRST_SESSION_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait until every broker votes.
const VOTERS_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for the first administrator's token in the broker's output.
const TOKEN_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Begins an administrator's token.
const TOKEN_PREFIX: &str = "svt_";

/// The arguments of `selvedge client COMMAND` for a seat, up to those of the command itself.
pub fn client_arguments(seat: &Seat, command: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        vec!["client".into(), command.into(), "--state".into(), seat.state.clone().into_os_string()];
    for (broker, link) in &seat.via {
        arguments.extend(["--via".into(), format!("{broker}={link}").into()]);
    }
    arguments
}

impl World {
    /// Everything from `cluster init` to the first answer.
    pub(super) async fn provision(
        &mut self,
        seats: &[(&str, &str, Region)],
        next_link: &mut u16,
        say: &dyn Fn(&str),
    ) -> anyhow::Result<()> {
        say("three brokers agree to be one cluster");
        self.cluster().await?;
        say("a directory pushes three people and a group");
        self.people().await?;
        say("clients and the workload enrol");
        for (name, whose, region) in seats {
            self.enrol_seat(name, whose, *region, next_link).await?;
        }
        say("zones, segments and policies are applied");
        self.policy().await?;
        say("connectors enrol and dial out");
        self.connectors(next_link).await?;
        say("the first session");
        self.first_session().await
    }

    async fn cluster(&mut self) -> anyhow::Result<()> {
        let [first, others @ ..] = Region::ALL;
        let config = text(&self.broker(first).config);
        let root_key = text(&self.dir().join("root.key"));
        let init =
            ["cluster", "init", "--config", &config, "--trust-domain", TRUST_DOMAIN, "--root-key-out", &root_key];
        let made = self.cli.json(&[init.as_slice(), &["--json"]].concat()).await?;
        let pin = made["pin"].as_str().context("`cluster init` says no pin")?;
        self.pin = pin.parse()?;
        self.start_broker(first).await?;
        let log = self.broker(first).process.log().to_owned();
        let token = until("the first administrator's token", TOKEN_LIMIT, async || {
            find(&std::fs::read_to_string(&log)?, TOKEN_PREFIX)
        })
        .await?;
        self.administrator = Caller::new(self.pin, token.clone())?;
        let mut context = vec!["context", "add", "demo", "--pin", pin, "--token", &token];
        let endpoints: Vec<String> = self.brokers.iter().map(|broker| format!("https://{}", broker.web)).collect();
        context.extend(endpoints.iter().flat_map(|endpoint| ["--endpoint", endpoint]));
        self.cli.ok(&context).await?;
        for region in others {
            let config = text(&self.broker(region).config);
            let secret = self.secret("broker", region.name(), "", 1).await?;
            let web = self.broker(first).web.to_string();
            self.cli.ok(&["cluster", "join", "--config", &config, "--token", &secret, "--via", &web]).await?;
            self.start_broker(region).await?;
        }
        until("three voters", VOTERS_LIMIT, async || {
            let status = self.cli.json(&["cluster", "status", "--json"]).await?;
            let rows = status["brokers"].as_array().into_iter().flatten();
            let voters = rows.filter(|row| row["raft"] == "voter").count();
            if voters == Region::ALL.len() { Ok(()) } else { bail!("{voters} brokers vote") }
        })
        .await
    }

    /// Users and groups, as a directory's provisioning sends them.
    async fn people(&mut self) -> anyhow::Result<()> {
        let made = self.cli.json(&["directory", "create", "demo", "--json"]).await?;
        let token = made["token"].as_str().context("`directory create` says no token")?;
        self.directory = Caller::new(self.pin, token.to_owned())?;
        let web = self.brokers[0].web;
        for (user, name) in [(ALLOWED, "Alma Allowed"), (DENIED, "Denis Denied"), (LEAVER, "Lea Leaver")] {
            let body = json!({
                "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"],
                "userName": user, "displayName": name, "active": true,
                "emails": [{ "value": user, "primary": true }],
            });
            let id = self.directory.create(web, "Users", &body).await?;
            self.users.insert(user, id);
        }
        let members: Vec<Value> = [ALLOWED, LEAVER].iter().map(|user| json!({ "value": self.users[*user] })).collect();
        let group = json!({
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"],
            "displayName": "sales", "members": members,
        });
        self.directory.create(web, "Groups", &group).await?;
        Ok(())
    }

    async fn policy(&mut self) -> anyhow::Result<()> {
        let dir = self.dir().join("policy");
        for (file, text) in policy_files(self.receiver.address()) {
            std::fs::write(dir.join(file), text)?;
        }
        self.cli.ok(&["apply", "-f", &text(&dir)]).await?;
        Ok(())
    }

    async fn connectors(&mut self, next_link: &mut u16) -> anyhow::Result<()> {
        let web = self.brokers[0].web.to_string();
        for region in Region::ALL {
            let group = region.name();
            let here: Vec<_> = CONNECTORS.iter().filter(|(_, place, _, _)| *place == region).collect();
            let secret = self.secret("connector", group, group, here.len()).await?;
            for (name, _, hosts, farther_ms) in here {
                let state = self.dir().join("connectors").join(name);
                let enrol = ["connector", "enrol", "--web", &web, "--secret", &secret, "--name", name, "--state"];
                self.cli.ok(&[enrol.as_slice(), &[&text(&state)]].concat()).await?;
                let links = self.end_links(region, Duration::from_millis(*farther_ms), next_link).await?;
                let via = self.via(&links);
                let config = self.dir().join("connectors").join(format!("{name}.toml"));
                std::fs::write(&config, self.connector_config(&state, name, hosts, &via))?;
                let arguments = ["connector".into(), "run".into(), "--config".into(), config.into_os_string()].to_vec();
                let log = self.dir().join("logs").join(format!("{name}.log"));
                let mut process = Process::new(*name, arguments, log);
                process.start()?;
                self.connectors.push(Connector { name: (*name).to_owned(), region, process, links });
            }
        }
        Ok(())
    }

    /// Enrols a device of a person, or the workload, in a region.
    pub async fn enrol_seat(
        &mut self,
        name: &str,
        whose: &str,
        region: Region,
        next_link: &mut u16,
    ) -> anyhow::Result<()> {
        let kind = if whose == BILLING { "workload" } else { "device" };
        let secret = self.secret(kind, name, whose, 1).await?;
        let state = self.dir().join("clients").join(name);
        let web = self.broker(region).web.to_string();
        let how = if whose == BILLING { "--secret" } else { "--code" };
        let enrol = ["client", "enrol", "--web", &web, how, &secret, "--name", name, "--state"];
        self.cli.ok(&[enrol.as_slice(), &[&text(&state)]].concat()).await?;
        let links = self.end_links(region, Duration::ZERO, next_link).await?;
        let via = self.via(&links);
        self.seats.insert(name.to_owned(), Seat { name: name.to_owned(), state, links, via });
        Ok(())
    }

    async fn first_session(&self) -> anyhow::Result<()> {
        let Some(seat) = self.seats.values().find(|seat| seat.name.starts_with("allowed")) else { return Ok(()) };
        let mut arguments = client_arguments(seat, "nc");
        arguments.extend([apps::CRM.0.into(), apps::CRM.1.to_string().into()]);
        until("the first answer of an application", FIRST_SESSION_LIMIT, async || {
            let ran = self.cli.run(arguments.clone(), b"GET / HTTP/1.1\r\nhost: crm.internal\r\n\r\n").await?;
            if ran.text().contains("200 OK") {
                Ok(())
            } else {
                bail!("{}{}", ran.err.trim_end(), ran.text().trim_end())
            }
        })
        .await
    }

    async fn end_links(&mut self, region: Region, farther: Duration, next_link: &mut u16) -> anyhow::Result<[Link; 3]> {
        let mut links = Vec::new();
        for at in 0..self.brokers.len() {
            let (to, edge) = (self.brokers[at].region, self.brokers[at].edge);
            let listener = self.ports.listen(*next_link).await?;
            *next_link += 1;
            links.push(Link::start(listener, edge, region.delay_to(to) + farther)?);
        }
        links.try_into().map_err(|_| anyhow::anyhow!("there are three brokers"))
    }

    fn via(&self, links: &[Link; 3]) -> BTreeMap<String, String> {
        let pairs = self.brokers.iter().zip(links);
        pairs.map(|(broker, link)| (broker.edge.to_string(), link.address().to_string())).collect()
    }

    fn connector_config(&self, state: &Path, name: &str, hosts: &[&str], via: &BTreeMap<String, String>) -> String {
        let addresses = hosts.iter().map(|host| (*host, self.apps.hosts[host]));
        let allow: Vec<String> = addresses.clone().map(|(_, address)| format!("{:?}", address.to_string())).collect();
        let hosts: Vec<String> = addresses.map(|(host, address)| format!("{host:?} = \"{}\"", address.ip())).collect();
        let via: Vec<String> = via.iter().map(|(broker, link)| format!("{broker:?} = {link:?}")).collect();
        format!(
            "state = {:?}\nname = {name:?}\nallow = [{}]\n\n[hosts]\n{}\n\n[via]\n{}\n",
            text(state),
            allow.join(", "),
            hosts.join("\n"),
            via.join("\n")
        )
    }

    async fn secret(&self, kind: &str, name: &str, target: &str, uses: usize) -> anyhow::Result<String> {
        let uses = uses.to_string();
        let mut create = vec!["key", "create", "--kind", kind, "--name", name, "--uses", &uses, "--json"];
        if !target.is_empty() {
            create.extend(["--target", target]);
        }
        let made = self.cli.json(&create).await?;
        made["secret"].as_str().map(str::to_owned).context("`key create` says no secret")
    }
}

/// What `apply -f` gets.
fn policy_files(receiver: SocketAddr) -> Vec<(&'static str, String)> {
    let regions = Region::ALL.map(|region| {
        let (name, place) = (region.name(), region.place());
        format!(
            "kind: Region\nname: {name}\nlatitude: {}\nlongitude: {}\n---\nkind: ConnectorGroup\nname: {name}\nregion: {name}\n",
            place.latitude, place.longitude
        )
    });
    let segment = |name: &str, (host, port): (&str, u16), groups: &str| {
        format!("kind: Segment\nname: {name}\nhosts: [{host}]\ntcp: [\"{port}\"]\nconnector_groups: [{groups}]\n")
    };
    let segments = [
        "kind: Zone\nname: internal\n".to_owned(),
        segment("crm", apps::CRM, "frankfurt, virginia"),
        segment("chat", apps::CHAT, "frankfurt, virginia"),
        segment("ledger", apps::LEDGER, "singapore"),
    ];
    let policies = [
        r#"kind: Policy
name: sales-may-sell
cedar: |
  permit(principal in Group::"sales", action == Action::"connect", resource)
  when { resource in Segment::"crm" || resource in Segment::"chat" };
"#,
        r#"kind: Policy
name: billing-keeps-the-ledger
cedar: |
  permit(principal == Workload::"billing", action == Action::"connect", resource in Segment::"ledger");
"#,
    ];
    vec![
        ("regions.yaml", regions.join("---\n")),
        ("segments.yaml", segments.join("---\n")),
        ("policies.yaml", policies.join("---\n")),
        ("receiver.yaml", format!("kind: Receiver\nname: siem\naddress: {receiver}\n")),
    ]
}

/// The first word of a text that begins with `prefix`.
fn find(text: &str, prefix: &str) -> anyhow::Result<String> {
    let from = text.find(prefix).with_context(|| format!("no `{prefix}` was printed"))?;
    let word = text[from..].split(|c: char| !(c.is_ascii_alphanumeric() || "._-=".contains(c))).next();
    Ok(word.unwrap_or_default().to_owned())
}

/// Tries until it succeeds.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("{what} did not come within {} s", limit.as_secs())));
            }
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
