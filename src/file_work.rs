//! Work on the file of an image that no node has open as an image: checks, repairs, amendments.

use crate::layer::Blockplex;
use crate::open::Opener;
use crate::options::OpenOptions;
use blockplex_graph::{Child, Result};

impl Blockplex {
    /// Opens a file and runs `work` on it, on the control loop, while nobody else may use the file
    /// as an image: locks and permissions are those that a format driver would have. What was
    /// opened is closed again.
    ///
    /// # Errors
    ///
    /// The file cannot be opened or locked; what `work` says.
    pub async fn with_image_file<T: Send + 'static>(
        &self,
        file: OpenOptions,
        work: impl AsyncFnOnce(&Child) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let layer = self.clone();
        self.on_control(move |local| async move {
            let read_only = file.is_read_only()?;
            let opened = Opener::open(&layer, &local, file).await?;
            let held = crate::open::hold(&layer, &local, opened.root, read_only).await;
            layer.remember(&opened, None);
            let result = match held {
                Ok((holder, child)) => {
                    let result = work(&child).await;
                    crate::open::let_go(&layer, holder).await;
                    result
                }
                Err(error) => Err(error),
            };
            let closed = layer.collect_unused().await;
            result.and_then(|value| closed.map(|()| value))
        })
        .await
    }
}
