//! The OpenAPI document, generated from the handlers.

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Paths, SecurityRequirement};

use super::api;

/// The administrators' API as an OpenAPI 3.1 document.
pub fn document() -> OpenApi {
    let mut paths = Paths::new();
    let mut components = ComponentsBuilder::new().security_scheme(
        "token",
        SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("svt_...").build()),
    );
    for route in api::routes() {
        components = components.schemas_from_iter(route.schemas);
        paths.merge(route.paths);
    }
    OpenApiBuilder::new()
        .info(InfoBuilder::new().title("Selvedge").version(env!("CARGO_PKG_VERSION")).build())
        .paths(paths)
        .components(Some(components.build()))
        .security(Some([SecurityRequirement::new("token", Vec::<String>::new())]))
        .build()
}
