//! The OpenAPI document, generated from the handlers.

use selvedge_cluster::Mode;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Paths, RefOr, Required, SecurityRequirement,
};

use super::api;
use super::read::mode_name;

/// The administrators' API as an OpenAPI 3.1 document.
pub fn document() -> OpenApi {
    let mut paths = Paths::new();
    let mut components = ComponentsBuilder::new().security_scheme(
        "token",
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("svt_...").build()),
    );
    for mut described in api::routes() {
        components = components.schemas_from_iter(described.schemas);
        if let Some(mode) = described.route.read {
            described.paths.paths.values_mut().filter_map(|item| item.get.as_mut()).for_each(|get| reads(get, mode));
        }
        paths.merge(described.paths);
    }
    OpenApiBuilder::new()
        .info(InfoBuilder::new().title("Selvedge").version(env!("CARGO_PKG_VERSION")).build())
        .paths(paths)
        .components(Some(components.build()))
        .security(Some([SecurityRequirement::new("token", Vec::<String>::new())]))
        .build()
}

/// What every read takes and answers besides its own.
fn reads(operation: &mut Operation, mode: Mode) {
    let parameter = |name: &str, description: &str, schema: Object| {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Header);
        RefOr::from(parameter.required(Required::False).description(Some(description)).schema(Some(schema)).build())
    };
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let modes = [Mode::Local, Mode::Linearizable].map(mode_name);
    operation.parameters.get_or_insert_default().extend([
        parameter(
            "Selvedge-Read",
            "`linearizable`: with everything that was committed before the request; `local`: as the answering broker has it",
            text().enum_values(Some(modes)).default(Some(mode_name(mode).into())).build(),
        ),
        parameter(
            "Selvedge-Position",
            "the position that the caller has seen: nothing older is answered (503 `stale`, 410 `reset`)",
            text().build(),
        ),
    ]);
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        if !status.starts_with('2') {
            continue;
        }
        for (name, description, schema) in [
            ("Selvedge-Read", "in which mode it was read", text().build()),
            ("Selvedge-Position", "position of the state that was read", text().build()),
            (
                "Selvedge-Age-Ms",
                "nothing that was committed longer ago is missing; absent when that is not known",
                ObjectBuilder::new().schema_type(Type::Integer).build(),
            ),
        ] {
            let header = HeaderBuilder::new().description(Some(description)).schema(Some(schema)).build();
            response.headers.insert(name.to_owned(), RefOr::T(header));
        }
    }
}
