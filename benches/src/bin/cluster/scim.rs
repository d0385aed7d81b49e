//! People and groups as a large directory pushes them, drawn from a seed.

use selvedge_domain::command::UserFields;
use serde_json::{Map, Value, json};

use crate::load::spread;

/// Bytes of one person's SCIM document.
pub const USER_BYTES: usize = 900;
/// Groups that a person is in, on average; one of them has everybody.
pub const GROUPS_EACH: usize = 8;
const ENTERPRISE: &str = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User";

const GIVEN: [&str; 16] = [
    "Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Frances", "Kenneth", "Margaret", "Dennis", "Radia",
    "Leslie", "Shafrira", "Tony", "Adele", "Niklaus",
];
const FAMILY: [&str; 16] = [
    "Lovelace",
    "Hopper",
    "Turing",
    "Dijkstra",
    "Liskov",
    "Knuth",
    "Allen",
    "Thompson",
    "Hamilton",
    "Ritchie",
    "Perlman",
    "Lamport",
    "Goldwasser",
    "Hoare",
    "Goldberg",
    "Wirth",
];
const PLACES: [&str; 8] = ["Frankfurt", "Dublin", "Ashburn", "Singapore", "Osaka", "Sydney", "Toronto", "Stockholm"];
const DEPARTMENTS: [&str; 8] =
    ["Engineering", "Finance", "Legal", "Operations", "Research", "Sales", "Security", "Support"];

/// A person as the log keeps them; their SCIM document has [`USER_BYTES`].
pub fn user(seed: u64, number: usize) -> UserFields {
    let draw = |what: u64| spread(seed ^ spread((number as u64) << 8 | what)) as usize;
    let (given, family) = (GIVEN[draw(1) % GIVEN.len()], FAMILY[draw(2) % FAMILY.len()]);
    let place = PLACES[draw(3) % PLACES.len()];
    let login = format!("{}.{}.{number:07}@corp.example", given.to_lowercase(), family.to_lowercase());
    let (high, low) = (spread(seed ^ draw(4) as u64), spread(seed ^ draw(5) as u64));
    let external = format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        high >> 32,
        high & 0xffff,
        high >> 16 & 0xfff,
        low >> 52,
        low & 0xffff_ffff_ffff
    );
    let mut document = json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User", ENTERPRISE],
        "userName": login,
        "externalId": external,
        "displayName": format!("{given} {family}"),
        "active": draw(6) % 50 != 0,
        "name": { "givenName": given, "familyName": family },
        "emails": [{ "value": login, "type": "work", "primary": true }],
        "phoneNumbers": [{ "value": format!("+49 69 {:07}", draw(7) % 10_000_000), "type": "work" }],
        "addresses": [{
            "type": "work", "locality": place, "postalCode": format!("{:05}", draw(8) % 100_000),
            "streetAddress": format!("{} Main Street", draw(9) % 400 + 1),
        }],
        "locale": "en-GB",
        "timezone": "Europe/Berlin",
        ENTERPRISE: {
            "employeeNumber": format!("{:08}", draw(10) % 100_000_000),
            "costCenter": format!("{:04}", draw(11) % 10_000),
            "department": DEPARTMENTS[draw(12) % DEPARTMENTS.len()],
            "manager": { "value": format!("1-{}", draw(13) % 1_000_000) },
        },
        "profileUrl": "https://people.corp.example/",
    });
    let missing = USER_BYTES.saturating_sub(document.to_string().len());
    let profile = format!("https://people.corp.example/{:0>missing$}", "");
    document["profileUrl"] = profile.into();
    debug_assert_eq!(document.to_string().len(), USER_BYTES);
    fields(document)
}

/// What SCIM keeps apart, and the rest.
fn fields(document: Value) -> UserFields {
    let Value::Object(mut object) = document else { unreachable!("written as an object above") };
    let text = |object: &mut Map<String, Value>, name: &str| {
        object.remove(name).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    };
    let user_name = text(&mut object, "userName");
    let external_id = text(&mut object, "externalId");
    let display_name = text(&mut object, "displayName");
    let active = object.remove("active") == Some(Value::Bool(true));
    object.remove("schemas");
    UserFields { user_name, external_id, display_name, active, attributes: Value::Object(object).to_string() }
}

/// Who is in which group: the first has everybody, the others have sizes after Zipf.
pub struct Groups {
    seed: u64,
    users: usize,
    /// By group.
    pub sizes: Vec<usize>,
}

impl Groups {
    pub fn new(seed: u64, users: usize, groups: usize) -> Self {
        let harmonic: f64 = (1..groups).map(|rank| 1.0 / rank as f64).sum();
        let scale = ((GROUPS_EACH - 1) * users) as f64 / harmonic.max(1.0);
        let others = (1..groups).map(|rank| ((scale / rank as f64).round() as usize).clamp(1, users));
        Self { seed, users, sizes: std::iter::once(users).chain(others).collect() }
    }

    pub fn memberships(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Numbers of a group's members, each once.
    pub fn members(&self, group: usize) -> impl Iterator<Item = usize> + use<> {
        let users = self.users;
        let mut step = (spread(self.seed ^ group as u64) as usize % users) | 1;
        while common_divisor(step, users) != 1 {
            step += 2;
        }
        let begin = spread(self.seed.rotate_left(17) ^ group as u64) as usize % users;
        (0..self.sizes[group]).map(move |n| (begin + (n as u128 * step as u128 % users as u128) as usize) % users)
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
